/** The safetensors format: a length, a JSON header, and the tensors' bytes. */

import { LoraportError } from './errors.js';
import { parseStrictJson } from './strict_json.js';
import { ELEMENT_TYPES } from './tensor_types.js';

/** @typedef {import('./tensor_types.js').PlainTensor} PlainTensor */

const LENGTH_BYTES = 8;

/**
 * Read a whole safetensors file.
 *
 * Tensors must fill the file without holes or overlaps, each as long as its shape and dtype say.
 * @param {Uint8Array} bytes
 * @param {string} file its name, for messages
 * @returns {Map<string, PlainTensor>}
 * @throws {LoraportError} if the file is not a sound safetensors file
 */
export function parseSafetensors(bytes, file) {
  /** @type {(what: string) => never} */
  const refuse = (what) => {
    throw new LoraportError(
      `${file}: expected a sound safetensors file, got ${what}; copy the bundle again`,
    );
  };
  if (bytes.length < LENGTH_BYTES) refuse(`only ${bytes.length} bytes`);
  const view = new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const length = Number(view.getBigUint64(0, true));
  const start = LENGTH_BYTES + length;
  if (start > bytes.length) refuse(`a header of ${length} bytes in a file of ${bytes.length}`);
  const header = parseHeader(bytes.subarray(LENGTH_BYTES, start)) ?? refuse('a damaged header');
  const tensors = new Map();
  let reached = 0;
  for (const [name, entry] of byOffset(header)) {
    const place = readPlace(entry) ?? refuse(`tensor ${name} without a dtype, or a whole number`);
    const { dtype, shape, begin, end } = place;
    const type = ELEMENT_TYPES.get(dtype) ?? refuse(`tensor ${name} of unknown dtype ${dtype}`);
    if (begin !== reached) refuse(`tensor ${name} at ${begin} where ${reached} comes next`);
    const count = shape.reduce((product, size) => product * size, 1);
    if (count * type.bytes !== end - begin) {
      refuse(`tensor ${name} of ${end - begin} bytes for ${dtype} [${shape}]`);
    }
    if (start + end > bytes.length) refuse(`tensor ${name} past the end; it is truncated`);
    reached = end;
    tensors.set(name, { dtype, shape, data: elements(bytes, start + begin, count, type) });
  }
  if (start + reached !== bytes.length) {
    refuse(`${bytes.length - start - reached} bytes that belong to no tensor`);
  }
  return tensors;
}

/**
 * @param {Uint8Array} bytes
 * @returns {[string, unknown][] | null}
 */
function parseHeader(bytes) {
  try {
    const header = parseStrictJson(bytes);
    if (typeof header !== 'object' || header === null || Array.isArray(header)) return null;
    return Object.entries(header).filter(([name]) => name !== '__metadata__');
  } catch {
    return null;
  }
}

/** @param {[string, unknown][]} header */
function byOffset(header) {
  /** @param {[string, any]} entry */
  const offsets = ([, value]) => value?.data_offsets ?? [0, 0];
  return [...header].sort((a, b) => {
    const [first, second] = [offsets(a), offsets(b)];
    return first[0] - second[0] || first[1] - second[1];
  });
}

/**
 * @param {any} entry
 * @returns {{dtype: string, shape: number[], begin: number, end: number} | null}
 */
function readPlace(entry) {
  const { dtype, shape, data_offsets: offsets } = entry ?? {};
  if (typeof dtype !== 'string' || !Array.isArray(shape) || !Array.isArray(offsets)) return null;
  const whole = [...shape, ...offsets].every((n) => Number.isSafeInteger(n) && n >= 0);
  if (!whole || offsets.length !== 2) return null;
  return { dtype, shape, begin: offsets[0], end: offsets[1] };
}

/**
 * @param {Uint8Array} bytes
 * @param {number} offset
 * @param {number} count
 * @param {import('./tensor_types.js').ElementType} type
 */
function elements(bytes, offset, count, type) {
  const absolute = bytes.byteOffset + offset;
  if (absolute % type.bytes === 0) return new type.array(bytes.buffer, absolute, count);
  const copy = bytes.slice(offset, offset + count * type.bytes);
  return new type.array(copy.buffer, 0, count);
}
