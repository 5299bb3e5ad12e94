import assert from 'node:assert/strict';
import { execFileSync } from 'node:child_process';
import { mkdtempSync, readFileSync, readdirSync, rmSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join } from 'node:path';
import test from 'node:test';

const root = new URL('../', import.meta.url).pathname;

test('the sources are sound and types/ is what they say', () => {
  const out = mkdtempSync(join(tmpdir(), 'types-'));
  const compiler = createRequire(import.meta.url).resolve('typescript/bin/tsc');
  try {
    execFileSync(process.execPath, [compiler, '-p', root, '--outDir', out], { encoding: 'utf8' });
    const list = (folder) => readdirSync(folder, { recursive: true }).filter((name) => name.endsWith('.ts')).sort();
    assert.deepEqual(list(join(root, 'types')), list(out));
    for (const name of list(out)) {
      assert.equal(readFileSync(join(root, 'types', name), 'utf8'), readFileSync(join(out, name), 'utf8'), `${name}: run npm run types`);
    }
  } catch (error) {
    assert.fail(error.stdout || error);
  } finally {
    rmSync(out, { recursive: true });
  }
});
