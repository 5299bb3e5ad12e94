/**
 * The page in Chromium. LORAPORT_BUNDLE: a bundle of a small language model with adapters a and b;
 * LORAPORT_TEXTS: its greedy texts by selection, as another runtime makes them; CHROMIUM: the browser.
 */

import assert from 'node:assert/strict';
import test, { after, before } from 'node:test';

import { check, generate, hasSet, launch, serve, shoot, visit } from './site.js';

const { prompt, tokens, texts } = JSON.parse(process.env.LORAPORT_TEXTS);
let site;
let browser;

before(async () => {
  site = await serve(process.env.LORAPORT_BUNDLE);
  browser = await launch();
});

after(async () => {
  await browser?.close();
  site?.stop();
});

async function ask(page) {
  await page.getByLabel('Prompt').fill(prompt);
  await page.getByText('Options').click();
  await page.getByLabel('Tokens at most').fill(String(tokens));
}

test('swap, slider and blend: the texts of another runtime, one opening, one download', async () => {
  const context = await browser.newContext({ viewport: { width: 1000, height: 900 } });
  const { page, fetched, complaints } = await visit(context, site.address);
  await ask(page);
  await hasSet(page, { a: 1 });
  assert.deepEqual(await generate(page), { base: texts.base, adapted: texts.a });

  await page.getByRole('slider', { name: /^Strength/ }).fill('0');
  await hasSet(page, { a: 0 });
  assert.equal(await page.textContent('#strength-value'), '0.00');
  assert.deepEqual(await generate(page), { base: texts.base, adapted: texts.base });

  await page.getByRole('slider', { name: /^Strength/ }).fill('0.5');
  await page.getByLabel('Adapter', { exact: true }).selectOption('b');
  await hasSet(page, { b: 0.5 });
  assert.deepEqual(await generate(page), { base: texts.base, adapted: texts['b=0.5'] });
  assert.equal(await page.textContent('#adapted-heading'), 'With b × 0.50');

  await page.getByLabel('Blend with').selectOption('a');
  await page.getByRole('slider', { name: /^Its strength/ }).fill('1');
  await hasSet(page, { b: 0.5, a: 1 });
  assert.deepEqual(await generate(page), { base: texts.base, adapted: texts['b=0.5 a=1'] });
  await shoot(page, 'blend');

  await page.getByLabel('Blend with').selectOption('');
  await page.getByLabel('Adapter', { exact: true }).selectOption('');
  await hasSet(page, null);
  assert.deepEqual(await generate(page), { base: texts.base, adapted: texts.base });

  assert.match(await page.textContent('#swap'), /the model was opened once/);
  assert.equal(fetched.filter((path) => path === 'model.onnx.data').length, 1);
  assert.equal(new Set(fetched).size, fetched.length);
  assert.deepEqual(complaints, []);
  assert.equal(new Set(Object.values(texts)).size, Object.keys(texts).length);
  await context.close();
});

test('every golden case agrees on WASM', async () => {
  const context = await browser.newContext();
  const { page, complaints } = await visit(context, site.address);
  const rows = await check(page);
  assert.deepEqual(rows.map(([name, , , , result]) => [name, result]), [
    ['base', '✓ agrees'], ['adapter-a', '✓ agrees'], ['adapter-b', '✓ agrees'], ['blend', '✓ agrees'],
  ]);
  assert.match(await page.textContent('#check-status'), /All files are intact and all 4 cases agree/);
  assert.deepEqual(complaints, []);
  await shoot(page, 'check');
  await context.close();
});

test('the second visit reads from the cache, until that is deleted or spoilt', async () => {
  const context = await browser.newContext();
  const first = await visit(context, site.address);
  assert.ok(first.fetched.includes('model.onnx.data'));
  const second = await visit(context, site.address);
  assert.deepEqual(second.fetched, ['manifest.json']);
  assert.match(await second.page.textContent('#model-facts'), /from this browser’s cache/);

  await second.page.evaluate(async () => {
    const cache = await caches.open('loraport');
    for (const key of await cache.keys()) await cache.put(key, new Response('spoilt'));
  });
  const third = await visit(context, site.address);
  assert.ok(third.fetched.includes('model.onnx.data'));
  assert.deepEqual(third.complaints, []);

  await third.page.getByRole('button', { name: 'Delete downloaded files' }).click();
  await third.page.getByText('Deleted.').waitFor();
  const fourth = await visit(context, site.address);
  assert.ok(fourth.fetched.includes('model.onnx.data'));
  await context.close();
});

test('a text stops at once when told to', async () => {
  const context = await browser.newContext();
  const { page } = await visit(context, site.address);
  await ask(page);
  await page.getByLabel('Tokens at most').fill('200');
  await page.evaluate(() => {
    const text = document.getElementById('base-text');
    new MutationObserver((_, observer) => {
      if (text.textContent === '') return;
      observer.disconnect();
      document.getElementById('stop').click();
    }).observe(text, { childList: true });
  });
  await generate(page);
  assert.ok(parseInt(await page.textContent('#base-speed'), 10) < 200);
  assert.ok(await page.getByRole('button', { name: 'Generate' }).isEnabled());
  await context.close();
});

test('a narrow screen needs no scrolling sideways, dark or light', async () => {
  for (const colorScheme of ['light', 'dark']) {
    const context = await browser.newContext({ viewport: { width: 360, height: 740 }, colorScheme });
    const { page } = await visit(context, site.address);
    await check(page);
    assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth));
    await shoot(page, `narrow-${colorScheme}`);
    await context.close();
  }
});

test('every control has a name', async () => {
  const context = await browser.newContext();
  const { page } = await visit(context, site.address);
  const nameless = await page.$$eval('input, select, textarea, button, progress', (controls) =>
    controls.filter((control) => !control.labels?.length && !control.textContent.trim()).map((control) => control.id));
  assert.deepEqual(nameless, []);
  await context.close();
});
