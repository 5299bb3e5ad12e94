/** Packed adapters: tensors named like the slots' inputs, scaling folded into B. */

import { LoraportError, Problems } from './errors.js';
import { ELEMENT_TYPES, SLOT_DTYPES, floatToHalf, halfToFloat, isFiniteTensor } from './tensor_types.js';

/**
 * @typedef {import('./manifest.js').Slot} Slot
 * @typedef {import('./tensor_types.js').PlainTensor} PlainTensor
 * @typedef {import('./tensor_types.js').TypedArray} TypedArray
 */

/**
 * Check that tensors fit the slots.
 * @param {Map<string, PlainTensor>} tensors
 * @param {Slot[]} slots
 * @param {string} file for messages
 * @throws {LoraportError} naming every tensor that has no slot or does not fit it
 */
export function requireFit(tensors, slots, file) {
  const problems = new Problems();
  const known = new Set(slots.flatMap((slot) => [slot.inputA, slot.inputB]));
  for (const [name, tensor] of tensors) {
    if (!known.has(name)) problems.add(name, 'a slot input of this bundle', 'none of this name');
    if (!isFiniteTensor(tensor)) problems.add(name, 'finite numbers', 'NaN or infinity');
  }
  for (const slot of slots) {
    const [a, b] = [tensors.get(slot.inputA), tensors.get(slot.inputB)];
    if (a === undefined && b === undefined) continue;
    if (a === undefined || b === undefined) {
      const missing = a === undefined ? slot.inputA : slot.inputB;
      problems.add(missing, 'the partner of the other matrix', 'no such tensor');
      continue;
    }
    const wanted = `[${slot.inFeatures}, r] and [r, ${slot.outFeatures}]`;
    const got = `[${a.shape.join(', ')}] and [${b.shape.join(', ')}]`;
    const [rank] = b.shape;
    const fits =
      a.shape.length === 2 &&
      b.shape.length === 2 &&
      a.shape[1] === rank &&
      Number(rank) > 0 &&
      a.shape[0] === slot.inFeatures &&
      b.shape[1] === slot.outFeatures;
    if (!fits) problems.add(slot.name, wanted, got);
    const dtype = SLOT_DTYPES.get(slot.dtype);
    if (a.dtype !== dtype || b.dtype !== dtype) {
      problems.add(slot.name, `${slot.dtype} elements`, `${a.dtype} and ${b.dtype}`);
    }
  }
  problems.throwIfAny(`${file} does not fit the bundle's slots`);
}

/**
 * Tensors that equal the weighted sum of several adapters.
 *
 * Ranks are concatenated and each strength is multiplied into its B, so the result is exactly
 * `Σ strength · update`, with one rounding of B.
 * @param {[Map<string, PlainTensor>, number][]} parts tensors and strength of each adapter
 * @param {Slot[]} slots
 * @returns {Map<string, PlainTensor>}
 */
export function blend(parts, slots) {
  const [first] = parts;
  if (first !== undefined && parts.length === 1 && first[1] === 1) return first[0];
  /** @type {Map<string, PlainTensor>} */
  const blended = new Map();
  for (const slot of slots) {
    /** @type {PlainTensor[]} */
    const a = [];
    /** @type {PlainTensor[]} */
    const b = [];
    for (const [tensors, strength] of parts) {
      const [partA, partB] = [tensors.get(slot.inputA), tensors.get(slot.inputB)];
      if (partA === undefined || partB === undefined) continue;
      a.push(partA);
      b.push(multiply(partB, strength));
    }
    if (a.length === 0) continue;
    blended.set(slot.inputA, a.length === 1 ? /** @type {PlainTensor} */ (a[0]) : besides(a));
    blended.set(slot.inputB, b.length === 1 ? /** @type {PlainTensor} */ (b[0]) : below(b));
  }
  return blended;
}

/**
 * What a slot without an adapter is fed: zeros of rank 1, which add nothing.
 * @param {Slot} slot
 * @returns {[PlainTensor, PlainTensor]} A and B
 */
export function zeroUpdate(slot) {
  const dtype = SLOT_DTYPES.get(slot.dtype) ?? '';
  return [
    zeros(dtype, [slot.inFeatures, 1], slot.name),
    zeros(dtype, [1, slot.outFeatures], slot.name),
  ];
}

/**
 * @param {string} dtype
 * @param {number[]} shape
 * @param {string} subject
 * @returns {PlainTensor}
 */
function zeros(dtype, shape, subject) {
  const type = ELEMENT_TYPES.get(dtype);
  if (type === undefined) {
    throw new LoraportError(`${subject}: expected float elements, got ${dtype || 'others'}`);
  }
  const count = shape.reduce((product, size) => product * size, 1);
  return { dtype, shape, data: new type.array(new ArrayBuffer(count * type.bytes), 0, count) };
}

/**
 * A times a strength, in float32, rounded once to its own type.
 * @param {PlainTensor} tensor
 * @param {number} strength
 * @returns {PlainTensor}
 */
function multiply(tensor, strength) {
  if (strength === 1) return tensor;
  const { dtype, shape, data } = tensor;
  const single = Math.fround(strength);
  if (data instanceof Float32Array) {
    return { dtype, shape, data: data.map((value) => value * single) };
  }
  if (dtype === 'F16' && data instanceof Uint16Array) {
    const scaled = data.map((bits) => floatToHalf(Math.fround(halfToFloat(bits) * single)));
    return { dtype, shape, data: scaled };
  }
  if (data instanceof Float64Array) {
    return { dtype, shape, data: data.map((value) => value * strength) };
  }
  throw new LoraportError(
    `adapter tensors of ${dtype}: expected F32, F16 or F64 in JavaScript; ` +
      'export the bundle with --precision fp32, fp16 or int4',
  );
}

/**
 * Matrices of equal height beside each other: `[in, r1 + r2 + …]`.
 * @param {PlainTensor[]} parts
 * @returns {PlainTensor}
 */
function besides(parts) {
  const rows = Number(parts[0]?.shape[0]);
  const width = parts.reduce((sum, part) => sum + Number(part.shape[1]), 0);
  const joined = zeros(String(parts[0]?.dtype), [rows, width], 'lora_A');
  let column = 0;
  for (const part of parts) {
    const columns = Number(part.shape[1]);
    copyColumns(joined.data, part.data, { rows, columns, width, column });
    column += columns;
  }
  return joined;
}

/**
 * Matrices of equal width below each other: `[r1 + r2 + …, out]`.
 * @param {PlainTensor[]} parts
 * @returns {PlainTensor}
 */
function below(parts) {
  const rows = parts.reduce((sum, part) => sum + Number(part.shape[0]), 0);
  const joined = zeros(String(parts[0]?.dtype), [rows, Number(parts[0]?.shape[1])], 'lora_B');
  let at = 0;
  for (const part of parts) {
    /** @type {any} */ (joined.data).set(part.data, at);
    at += part.data.length;
  }
  return joined;
}

/**
 * Ranks are small: a plain loop is some times faster than a view for every row.
 * @param {any} target
 * @param {any} source of the same type
 * @param {{rows: number, columns: number, width: number, column: number}} place
 */
function copyColumns(target, source, { rows, columns, width, column }) {
  for (let row = 0; row < rows; row++) {
    for (let index = 0; index < columns; index++) {
      target[row * width + column + index] = source[row * columns + index];
    }
  }
}
