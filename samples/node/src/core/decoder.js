/** What generation needs to know of a decoder language model, from `genai_config.json`. */

import { LoraportError } from './errors.js';

const GENAI_CONFIG = 'genai_config.json';

/**
 * @typedef {object} Decoder
 * @property {[string, string][]} cache input and output name of each part of the KV cache
 * @property {[number, number, number, number]} emptyCache its shape before the first token
 * @property {Set<number>} stopIds tokens that end the text
 * @property {number} contextLength most tokens that fit
 * @property {number} vocabulary number of tokens that there are
 */

/**
 * Read it from a bundle.
 * @param {import('./bundle.js').Bundle} bundle
 * @returns {Promise<Decoder>}
 * @throws {LoraportError} if the bundle is no decoder language model
 */
export async function readDecoder(bundle) {
  const model = (await bundle.readJson(GENAI_CONFIG))?.model;
  const { inputs, outputs, ...sizes } = model?.decoder ?? {};
  const stop = model?.eos_token_id;
  const numbers = [sizes.num_hidden_layers, sizes.num_key_value_heads, sizes.head_size];
  const names = [
    [inputs?.past_key_names, outputs?.present_key_names],
    [inputs?.past_value_names, outputs?.present_value_names],
  ];
  const complete =
    [...numbers, model?.context_length, model?.vocab_size].every(Number.isInteger) &&
    names.flat().every((name) => typeof name === 'string');
  if (!complete) {
    throw new LoraportError(
      `${bundle.store.name}: expected a decoder language model with ${GENAI_CONFIG}, got ` +
        (model === undefined ? 'a bundle without it' : 'an incomplete one'),
    );
  }
  const [layers, heads, headSize] = numbers;
  /** @type {[string, string][]} */
  const cache = [];
  for (let layer = 0; layer < layers; layer++) {
    for (const [past, present] of names) {
      cache.push([past.replace('%d', layer), present.replace('%d', layer)]);
    }
  }
  return {
    cache,
    emptyCache: [1, heads, 0, headSize],
    stopIds: new Set(Array.isArray(stop) ? stop : [stop]),
    contextLength: model.context_length,
    vocabulary: model.vocab_size,
  };
}
