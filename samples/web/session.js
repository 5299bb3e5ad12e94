/** Open a bundle's model with onnxruntime-web, on WebGPU where there is one, else on WASM. */

import { LoraportError, Model, readDecoder } from './vendor/core/index.js';
import { explain, requireRoom } from './memory.js';

const MOST_THREADS = 4;
const GPU_ANSWERS_WITHIN = 5000; // milliseconds

/**
 * @typedef {object} OpenedModel
 * @property {Model} model
 * @property {'wasm' | 'webgpu'} runtime
 * @property {number} threads
 * @property {string} notice why it is not what was asked for; mostly empty
 */

/**
 * @param {import('./vendor/core/bundle.js').Bundle} bundle
 * @param {'auto' | 'wasm' | 'webgpu'} wanted
 * @returns {Promise<OpenedModel>}
 * @throws {LoraportError} if the model cannot be opened, with the reason
 */
export async function openModel(bundle, wanted) {
  const files = await modelFiles(bundle);
  const hasGpu = wanted !== 'wasm' && (await findGpu());
  if (wanted === 'webgpu' && !hasGpu) {
    throw new LoraportError('WebGPU: expected a GPU that this browser can use, got none; use WASM');
  }
  if (!hasGpu) return open(bundle, files, 'wasm', '');
  try {
    return await open(bundle, files, 'webgpu', '');
  } catch (error) {
    if (wanted === 'webgpu') throw error;
    return open(bundle, files, 'wasm', `WebGPU could not be used (${error.message}).`);
  }
}

/** The GPU that the browser offers; null where there is none, or none that answers. */
async function findGpu() {
  const silence = new Promise((resolve) => setTimeout(resolve, GPU_ANSWERS_WITHIN, null));
  return Promise.race([navigator.gpu?.requestAdapter().catch(() => null) ?? null, silence]);
}

async function open(bundle, { graph, externalData, bytes }, runtime, notice) {
  try {
    const ort = await import(`./vendor/ort/ort.${runtime}.mjs`);
    ort.env.logLevel = 'error';
    ort.env.wasm.wasmPaths = { wasm: new URL(`./vendor/ort/ort.${runtime}.wasm`, import.meta.url).href };
    // Without the headers that isolate the page there is no shared memory, hence one thread.
    const threads = crossOriginIsolated ? Math.min(MOST_THREADS, navigator.hardwareConcurrency) : 1;
    ort.env.wasm.numThreads = threads;
    const session = await ort.InferenceSession.create(graph, {
      executionProviders: [runtime],
      externalData,
      preferredOutputLocation: runtime === 'webgpu' ? await cacheOnGpu(bundle) : undefined,
    });
    return { model: new Model(ort, session, bundle), runtime, threads, notice };
  } catch (error) {
    throw explain(error, bytes);
  }
}

/** The graph whose slots are plain inputs, and the weights that it keeps beside it. */
async function modelFiles(bundle) {
  let bytes = 0;
  try {
    const graph = await bundle.read(bundle.manifest.model);
    const externalData = [];
    for (const path of bundle.manifest.files.keys()) {
      if (!path.endsWith('.data')) continue;
      const data = await bundle.read(path);
      bytes += data.length;
      requireRoom(bytes);
      externalData.push({ path, data });
    }
    return { graph, externalData, bytes };
  } catch (error) {
    throw explain(error, bytes);
  }
}

/** The KV cache stays where it is computed: only the logits come back. */
async function cacheOnGpu(bundle) {
  if (!bundle.manifest.files.has('genai_config.json')) return undefined;
  const { cache } = await readDecoder(bundle);
  return Object.fromEntries(cache.map(([, present]) => [present, 'gpu-buffer']));
}
