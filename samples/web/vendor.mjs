/** Copy what the page needs of its npm packages, and the core it shares with samples/node. */

import { cp, mkdir, rm } from 'node:fs/promises';
import { fileURLToPath } from 'node:url';

const here = new URL('./', import.meta.url);
const vendor = new URL('vendor/', here);

/** Where it lies → what the page calls it. */
const FILES = {
  'node_modules/onnxruntime-web/dist/ort.wasm.bundle.min.mjs': 'ort/ort.wasm.mjs',
  'node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.wasm': 'ort/ort.wasm.wasm',
  'node_modules/onnxruntime-web/dist/ort.webgpu.bundle.min.mjs': 'ort/ort.webgpu.mjs',
  'node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.asyncify.wasm': 'ort/ort.webgpu.wasm',
  'node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs': 'tokenizers.mjs',
  'node_modules/@huggingface/jinja/dist/index.js': 'jinja.mjs',
  '../node/src/core/': 'core/',
};

await rm(vendor, { recursive: true, force: true });
await mkdir(new URL('ort/', vendor), { recursive: true });
for (const [from, to] of Object.entries(FILES)) {
  await cp(fileURLToPath(new URL(from, here)), fileURLToPath(new URL(to, vendor)), {
    recursive: true,
  });
}
process.stdout.write(`copied ${Object.keys(FILES).length} entries to ${fileURLToPath(vendor)}\n`);
