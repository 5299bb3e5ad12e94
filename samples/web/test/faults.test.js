/** What is wrong with a bundle is told, once and clearly. The faults are made on the way. */

import assert from 'node:assert/strict';
import { createHash } from 'node:crypto';
import { cpSync, mkdtempSync, readFileSync, rmSync, truncateSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import test, { after, before } from 'node:test';

import { explain, requireRoom } from '../memory.js';
import { check, hasSet, launch, serve, shoot, visit } from './site.js';

const bundle = process.env.LORAPORT_BUNDLE;
const manifest = JSON.parse(readFileSync(join(bundle, 'manifest.json'), 'utf8'));
let site;
let browser;

before(async () => {
  site = await serve(bundle);
  browser = await launch();
});

after(async () => {
  await browser?.close();
  site?.stop();
});

const flip = (bytes) => {
  bytes[bytes.length >> 1] ^= 1;
  return bytes;
};
const edited = (edit) => (bytes) => {
  const document = JSON.parse(bytes);
  delete document.manifest_sha256;
  edit(document);
  return sealed(document);
};
const sealed = (document) => {
  const head = `${JSON.stringify(document, null, 1).slice(0, -2)},\n "manifest_sha256": "`;
  return Buffer.from(`${head}${createHash('sha256').update(head).digest('hex')}"\n}\n`);
};
const outside = 'adapters/../../x';

/** What the page says when files reach it changed; null where it says nothing. */
async function said(paths, change, act = async () => undefined) {
  const context = await browser.newContext();
  for (const path of [paths].flat()) {
    await context.route(`**/bundle/${path}`, async (route) => {
      if (change === null) await route.fulfill({ status: 404 });
      else await route.fulfill({ body: change(readFileSync(join(bundle, path))) });
    });
  }
  const { page } = await visit(context, site.address);
  await act(page);
  const alert = page.getByRole('alert');
  const message = (await alert.count()) ? await alert.textContent() : null;
  await shoot(page, 'error');
  await context.close();
  return message;
}

for (const path of ['model.required.onnx', 'model.onnx.data', 'tokenizer.json', 'adapters/a.safetensors']) {
  test(`a flipped byte in ${path} is refused`, async () => {
    const message = await said(path, flip);
    assert.match(message, new RegExp(`^${path}: expected sha256 [0-9a-f]{12}, got [0-9a-f]{12}; copy`));
  });
}

test('the check refuses a flipped byte in any file', async () => {
  const paths = ['golden/base.safetensors', 'adapters/b.onnx_adapter', 'model.onnx', 'genai_config.json'];
  const [first, ...named] = (await said(paths, flip, check)).split('\n');
  assert.match(first, / is not intact$/);
  assert.deepEqual(named.map((line) => line.match(/^  - (.*): expected sha256 /)?.[1]).sort(), [...paths].sort());
  assert.ok(paths.every((path) => path in manifest.files));
});

for (const [what, path, change, message] of [
  ['a missing manifest', 'manifest.json', null, /expected a bundle with manifest\.json, got: HTTP 404/],
  ['a missing file', 'model.onnx.data', null, /expected the file model\.onnx\.data, got: HTTP 404/],
  ['a truncated file', 'model.onnx.data', (bytes) => bytes.subarray(9), /^model\.onnx\.data: expected sha256/],
  ['a truncated manifest', 'manifest.json', (bytes) => bytes.subarray(0, 900), /^manifest\.json: expected its own sha256 at its end/],
  ['a flipped byte in the manifest', 'manifest.json', flip, /^manifest\.json: expected sha256 [0-9a-f]{12}, got/],
  ['another version', 'manifest.json', edited((d) => { d.schema_version = 2; }), /expected schema version 1, got 2/],
  ['a path that leaves the bundle', 'manifest.json', edited((d) => { d.adapters.a.tensors = outside; }), /outside the bundle\n  - "adapters\/\.\.\/\.\.\/x": expected a path inside/],
  ['an adapter of another base', 'manifest.json', edited((d) => { for (const slot of d.slots) slot.in_features += 1; }), /adapters\/a\.safetensors does not fit the bundle's slots\n/],
  ['a file without a hash', 'manifest.json', edited((d) => { delete d.files['adapters/a.safetensors']; }), /^adapters\/a\.safetensors: expected a file that manifest\.json lists/],
]) {
  test(`${what} is refused`, async () => {
    assert.match(await said(path, change), message);
  });
}

test('an adapter that cannot be read leaves the one before, and the page alive', async () => {
  const message = await said('adapters/b.safetensors', flip, async (page) => {
    await page.getByLabel('Adapter', { exact: true }).selectOption('b');
    await page.getByRole('alert').waitFor();
    assert.equal(await page.textContent('#adapted-heading'), 'With a × 1.00');
    const shown = await page.getByRole('alert').textContent();
    assert.match(shown, /^adapters\/b\.safetensors: expected sha256/);
    await page.getByLabel('Adapter', { exact: true }).selectOption('');
    await hasSet(page, null);
  });
  assert.equal(message, null);
});

test('a model that memory cannot hold is told so, with what to do', async () => {
  const huge = mkdtempSync(join(tmpdir(), 'huge-'));
  cpSync(bundle, huge, { recursive: true });
  truncateSync(join(huge, 'model.onnx.data'), 1e12); // without content: it takes no room
  const other = await serve(huge);
  const context = await browser.newContext();
  const { page } = await visit(context, other.address);
  const message = await page.getByRole('alert').textContent();
  assert.match(message, /^Not enough memory: the model has 1000000 MB of weights and needs about/);
  assert.match(message, /use a bundle exported with --precision int4/);
  await context.close();
  other.stop();
  rmSync(huge, { recursive: true });
});

test('weights are refused by what they take, and the runtime\'s own words for it are understood', () => {
  requireRoom(3e9);
  assert.throws(() => requireRoom(4e9), /Not enough memory: the model has 4000 MB of weights/);
  for (const error of [new RangeError('Array buffer allocation failed'), new Error('std::bad_alloc'), 'Aborted(OOM)']) {
    assert.match(explain(error, 5e8).message, /^Not enough memory: the model has 500 MB of weights and needs about 1450 MB/);
  }
  assert.equal(explain(new Error('no such operator'), 5e8).message, 'the model cannot be opened: no such operator');
});

test('a GPU that never answers is not waited for', async () => {
  const context = await browser.newContext();
  await context.route('**/session.js', async (route) => {
    const source = readFileSync(new URL('../session.js', import.meta.url), 'utf8');
    const silent = 'Object.defineProperty(navigator, "gpu", { value: { requestAdapter: () => new Promise(() => {}) } });';
    await route.fulfill({ body: `${source}\n${silent}`, contentType: 'text/javascript' });
  });
  const { page, complaints } = await visit(context, site.address, { runtime: 'auto' });
  assert.match(await page.textContent('#model-facts'), /running on WASM/);
  assert.deepEqual(complaints, []);
  await context.close();
});

test('a tolerance that is not met is shown', async () => {
  const context = await browser.newContext();
  await context.route('**/bundle/manifest.json', async (route) => {
    const strict = edited((document) => { document.tolerances = { wasm: 0 }; });
    await route.fulfill({ body: strict(readFileSync(join(bundle, 'manifest.json'))) });
  });
  const { page } = await visit(context, site.address);
  const rows = await check(page);
  assert.ok(rows.every((row) => row.at(-1) === '✗ differs'));
  assert.match(await page.textContent('#check-status'), /4 of 4 cases differ/);
  await context.close();
});

test('a page without its vendored files says what to do', async () => {
  const context = await browser.newContext();
  await context.route('**/vendor/tokenizers.mjs', (route) => route.fulfill({ status: 404 }));
  const { page } = await visit(context, site.address);
  assert.match(await page.getByRole('alert').textContent(), /run npm run vendor/);
  await context.close();
});
