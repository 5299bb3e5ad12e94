/** Say in plain words that memory is short. */

import { LoraportError, firstLine } from './vendor/core/index.js';

// WebAssembly addresses 4 GiB, and the runtime needs room beside the weights.
const MOST_BYTES = 3.5e9;
const SIGNS = /out of memory|bad_alloc|could not allocate|allocation fail|cannot enlarge memory|OOM/i;

/**
 * Refuse a model that no browser can hold, before it is fetched.
 * @param {number} bytes of the weights
 * @throws {LoraportError}
 */
export function requireRoom(bytes) {
  if (bytes > MOST_BYTES) throw shortOfMemory(bytes);
}

/**
 * What to tell the user when the model cannot be opened.
 * @param {unknown} error
 * @param {number} bytes of the weights
 * @returns {LoraportError}
 */
export function explain(error, bytes) {
  if (error instanceof LoraportError) return error;
  if (error instanceof RangeError || SIGNS.test(String(error))) {
    return shortOfMemory(Math.max(bytes, Reflect.get(Object(error), 'bytes') ?? 0));
  }
  return new LoraportError(`the model cannot be opened: ${firstLine(error)}`, { cause: error });
}

function shortOfMemory(bytes) {
  const megabytes = (amount) => `${Math.round(amount / 1e6)} MB`;
  const device = globalThis.navigator?.deviceMemory;
  return new LoraportError(
    `Not enough memory: the model has ${megabytes(bytes)} of weights and needs about ` +
      `${megabytes(bytes * 2.5 + 2e8)} while it opens` +
      (device ? `; this device reports ${device} GB in all` : '') +
      '. Close other tabs and load again, or use a bundle exported with --precision int4.',
  );
}
