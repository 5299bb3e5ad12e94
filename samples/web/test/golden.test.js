/**
 * The golden check of one bundle in Chromium on WASM. LORAPORT_BUNDLE: the bundle; LORAPORT_DIFFER:
 * names of the cases that must differ, separated by commas; CHROMIUM: the browser.
 */

import assert from 'node:assert/strict';
import { readFileSync } from 'node:fs';
import { join } from 'node:path';
import test from 'node:test';

import { check, hasSet, launch, serve, visit } from './site.js';

const bundle = process.env.LORAPORT_BUNDLE;
const differ = (process.env.LORAPORT_DIFFER ?? '').split(',').filter(Boolean);

test('golden cases agree or differ as they must, and a swap opens nothing', async () => {
  const { golden } = JSON.parse(readFileSync(join(bundle, 'manifest.json'), 'utf8'));
  const site = await serve(bundle);
  const browser = await launch();
  try {
    const { page, fetched, complaints } = await visit(await browser.newContext(), site.address);
    await page.getByLabel('Adapter', { exact: true }).selectOption('b');
    await hasSet(page, { b: 1 });
    assert.equal(fetched.filter((path) => path === 'model.onnx.data').length, 1);
    const rows = await check(page);
    assert.deepEqual(
      rows.map(([name, , , , result]) => [name, result]),
      Object.keys(golden).map((name) => [name, differ.includes(name) ? '✗ differs' : '✓ agrees']),
    );
    assert.match(await page.textContent('#swap'), /the model was opened once/);
    assert.deepEqual(complaints, []);
  } finally {
    await browser.close();
    site.stop();
  }
});
