/** Generate tokens with the KV cache. */

import { readDecoder } from './decoder.js';
import { LoraportError } from './errors.js';
import { choose, readSampling, seededRandom } from './sampling.js';
import { asFloat32 } from './tensor_types.js';

/**
 * @typedef {import('./model.js').Model} Model
 * @typedef {import('onnxruntime-common').Tensor} Tensor
 */

/**
 * @typedef {object} Choice
 * @property {import('./model.js').Selection} [adapter] for this text; the one that is set, if left out
 * @property {AbortSignal} [signal] stops before the next token
 *
 * @typedef {Partial<import('./sampling.js').Sampling> & Choice} GenerateOptions
 */

/**
 * Yield new tokens one by one, until a stop token or `maxNewTokens`.
 *
 * Each text has its own cache and keeps the adapter it began with, so several may be generated
 * in turns with different adapters. Where a longer text is rotated by other factors (longrope), the
 * cache is computed anew once as many tokens are there.
 * @param {Model} model
 * @param {readonly number[]} tokenIds the prompt, at least one token
 * @param {GenerateOptions} [options]
 * @returns {AsyncGenerator<number, void, void>}
 * @throws {LoraportError} if the prompt is empty, too long or not of tokens, or the bundle is no
 *   decoder
 */
export async function* generate(model, tokenIds, { adapter, signal, ...given } = {}) {
  const sampling = readSampling(given);
  const decoder = await readDecoder(model.bundle);
  if (tokenIds.length === 0 || tokenIds.length >= decoder.contextLength) {
    throw new LoraportError(
      `prompt: expected 1 to ${decoder.contextLength - 1} tokens, got ${tokenIds.length}`,
    );
  }
  const last = decoder.vocabulary - 1;
  const unknown = [...tokenIds].find((id) => !(Number.isInteger(id) && id >= 0 && id <= last));
  if (unknown !== undefined) {
    throw new LoraportError(`prompt: expected tokens from 0 to ${last}, got ${unknown}`);
  }
  const slots = await model.feedsFor(adapter);
  const random = seededRandom(sampling.seed);
  const cacheNames = decoder.cache.filter(([past]) => model.inputNames.includes(past));
  const outputs = ['logits', ...cacheNames.map(([, present]) => present)];
  let cache = emptyCache(model, decoder, cacheNames);
  const text = [...tokenIds];
  let step = tokenInputs(model, text, 0);
  const border = model.bundle.manifest.longRotationsAfter;
  const most = Math.min(sampling.maxNewTokens, decoder.contextLength - text.length);
  try {
    for (let count = 0; count < most && !signal?.aborted; count++) {
      const results = await model.run({ ...step, ...cache }, { slots, outputs });
      free(cache);
      cache = {};
      for (const [past, present] of cacheNames) {
        cache[past] = /** @type {Tensor} */ (results[present]);
      }
      const token = choose(lastLogits(/** @type {Tensor} */ (results.logits)), sampling, random);
      if (decoder.stopIds.has(token)) return;
      yield token;
      text.push(token);
      if (text.length - 1 === border) {
        free(cache);
        cache = emptyCache(model, decoder, cacheNames);
        step = tokenInputs(model, text, 0);
      } else {
        step = tokenInputs(model, [token], text.length - 1);
      }
    }
  } finally {
    free(cache);
  }
}

/**
 * @param {Model} model
 * @param {import('./decoder.js').Decoder} decoder
 * @param {[string, string][]} names
 * @returns {Record<string, Tensor>}
 */
function emptyCache(model, decoder, names) {
  /** @type {Record<string, Tensor>} */
  const cache = {};
  const metadata = new Map(model.session.inputMetadata.map((input) => [input.name, input]));
  for (const [past] of names) {
    const input = metadata.get(past);
    const type = input?.isTensor ? input.type : 'float32';
    const data = type === 'float16' ? new Uint16Array(0) : new Float32Array(0);
    cache[past] = new model.ort.Tensor(/** @type {any} */ (type), data, decoder.emptyCache);
  }
  return cache;
}

/**
 * The inputs that depend on the tokens.
 * @param {Model} model
 * @param {readonly number[]} tokenIds
 * @param {number} past tokens in the cache
 * @returns {Record<string, Tensor>}
 */
function tokenInputs(model, tokenIds, past) {
  const stop = past + tokenIds.length;
  /** @type {(values: number[]) => Tensor} */
  const row = (values) =>
    new model.ort.Tensor('int64', BigInt64Array.from(values, BigInt), [1, values.length]);
  /** @type {Record<string, Tensor>} */
  const inputs = { input_ids: row([...tokenIds]) };
  if (model.inputNames.includes('attention_mask')) {
    inputs.attention_mask = row(new Array(stop).fill(1));
  }
  if (model.inputNames.includes('position_ids')) {
    inputs.position_ids = row(tokenIds.map((_, index) => past + index));
  }
  return inputs;
}

/**
 * @param {Tensor} logits `[1, sequence, vocabulary]`
 * @returns {Float32Array} of the last position
 */
function lastLogits(logits) {
  const vocabulary = Number(logits.dims.at(-1));
  const data = /** @type {Float32Array} */ (logits.data);
  return asFloat32(data.subarray(data.length - vocabulary));
}

/**
 * Free tensors that lie on a GPU; others are the garbage collector's.
 * @param {Record<string, Tensor>} tensors
 */
function free(tensors) {
  for (const tensor of Object.values(tensors)) {
    if (tensor.location === 'gpu-buffer') tensor.dispose();
  }
}
