/** Several packed adapters with a strength each, as the tensors of one. */

import { LoraportError, Problems } from './errors.js';
import { floatToHalf, asFloat32 } from './tensor_types.js';
import { emptyTensor } from './packed_adapter.js';

/**
 * @typedef {import('./manifest.js').SlotTable} SlotTable
 * @typedef {import('./manifest.js').SlotInput} SlotInput
 * @typedef {import('./tensor_types.js').PlainTensor} PlainTensor
 * @typedef {[PlainTensor, number]} Part
 */

/**
 * Tensors that equal the weighted sum of several adapters.
 *
 * Ranks are concatenated and each strength is multiplied into its B, so the result is exactly
 * `Σ strength · update`, with one rounding of B. A gain moves from one by
 * `Σ strength · (gain - 1)`, a bias from zero, a whole parameter from the base's own.
 * @param {[Map<string, PlainTensor>, number][]} parts tensors and strength of each adapter
 * @param {SlotTable} table
 * @param {Map<string, PlainTensor>} baseValues of the parameters that can be replaced
 * @returns {Map<string, PlainTensor>}
 * @throws {LoraportError} if a gain meets a replaced weight: that is no sum
 */
export function blend(parts, table, baseValues = new Map()) {
  const [first] = parts;
  if (first !== undefined && parts.length === 1 && first[1] === 1) return first[0];
  /** @type {Map<string, PlainTensor>} */
  const blended = new Map();
  for (const slot of table.slots) {
    for (const input of slot.inputs) {
      const found = present(parts, input.name);
      if (found.length > 0) blended.set(input.name, blendInput(input, found));
    }
  }
  for (const { input } of table.replacements) {
    const found = present(parts, input);
    const [only] = found;
    if (only === undefined) continue;
    const base = baseValues.get(input);
    if (found.length === 1 && only[1] === 1) blended.set(input, only[0]);
    else if (base === undefined) {
      throw new LoraportError(`${input}: expected the base's value in the bundle, got none`);
    } else blended.set(input, moved(found, base));
  }
  refuseProducts(blended, table);
  return blended;
}

/**
 * @param {[Map<string, PlainTensor>, number][]} parts
 * @param {string} name
 * @returns {Part[]}
 */
function present(parts, name) {
  /** @type {Part[]} */
  const found = [];
  for (const [tensors, strength] of parts) {
    const tensor = tensors.get(name);
    if (tensor !== undefined) found.push([tensor, strength]);
  }
  return found;
}

/**
 * @param {SlotInput} input
 * @param {Part[]} parts
 * @returns {PlainTensor}
 */
function blendInput({ role, shape, neutral }, parts) {
  const axis = shape.indexOf(null);
  if (role === 'lora_A') return concatenated(parts.map(([tensor]) => tensor), axis);
  if (axis >= 0) return concatenated(parts.map((part) => scaled(part)), axis);
  const like = /** @type {Part} */ (parts[0])[0];
  const base = emptyTensor(like.dtype, like.shape, role);
  const value = like.dtype === 'F16' ? floatToHalf(neutral) : neutral;
  /** @type {any} */ (base.data).fill(value);
  return moved(parts, base);
}

/**
 * The base's value plus `Σ strength · (value - base)`, rounded once.
 * @param {Part[]} parts
 * @param {PlainTensor} base
 * @returns {PlainTensor}
 */
function moved(parts, base) {
  const from = numbers(base);
  const sum = Float64Array.from(from);
  for (const [tensor, strength] of parts) {
    const values = numbers(tensor);
    sum.forEach((value, index) => {
      sum[index] = value + strength * (Number(values[index]) - Number(from[index]));
    });
  }
  return rounded(sum, base);
}

/**
 * A tensor times its strength, rounded once to its own type.
 * @param {Part} part
 * @returns {PlainTensor}
 */
function scaled([tensor, strength]) {
  if (strength === 1) return tensor;
  const single = tensor.dtype === 'F64' ? strength : Math.fround(strength);
  if (tensor.data instanceof Float32Array) {
    return { ...tensor, data: tensor.data.map((value) => value * single) };
  }
  return rounded(Float64Array.from(numbers(tensor), (value) => value * single), tensor);
}

/**
 * @param {PlainTensor} tensor
 * @returns {Float32Array | Float64Array}
 */
function numbers({ dtype, data }) {
  if (data instanceof Float64Array || data instanceof Float32Array) return data;
  if (dtype === 'F16' && data instanceof Uint16Array) return asFloat32(data);
  throw new LoraportError(
    `adapter tensors of ${dtype}: expected F32, F16 or F64 in JavaScript; ` +
      'export the bundle with --precision fp32, fp16 or int4',
  );
}

/**
 * @param {Float64Array} values
 * @param {PlainTensor} like
 * @returns {PlainTensor}
 */
function rounded(values, { dtype, shape }) {
  if (dtype === 'F64') return { dtype, shape, data: values };
  if (dtype === 'F32') return { dtype, shape, data: Float32Array.from(values) };
  const data = Uint16Array.from(values, (value) => floatToHalf(Math.fround(value)));
  return { dtype, shape, data };
}

/**
 * Tensors one after another along an axis.
 * @param {PlainTensor[]} parts of one shape but for the axis
 * @param {number} axis
 * @returns {PlainTensor}
 */
function concatenated(parts, axis) {
  const [first] = parts;
  if (first === undefined) throw new LoraportError('a blend of nothing');
  if (parts.length === 1) return first;
  const shape = [...first.shape];
  shape[axis] = parts.reduce((sum, part) => sum + Number(part.shape[axis]), 0);
  const joined = emptyTensor(first.dtype, shape, 'a blend');
  const outer = shape.slice(0, axis).reduce((product, size) => product * size, 1);
  const stride = joined.data.length / outer;
  let at = 0;
  for (const part of parts) {
    const run = part.data.length / outer;
    // Ranks are small: a plain loop is some times faster than a view for every row.
    const [target, source] = [/** @type {any} */ (joined.data), part.data];
    for (let row = 0; row < outer; row++) {
      for (let index = 0; index < run; index++) {
        target[row * stride + at + index] = source[row * run + index];
      }
    }
    at += run;
  }
  return joined;
}

/**
 * @param {Map<string, PlainTensor>} blended
 * @param {SlotTable} table
 */
function refuseProducts(blended, { slots, replacements }) {
  const problems = new Problems();
  const replaced = new Set(
    replacements.filter(({ input }) => blended.has(input)).map(({ parameter }) => parameter),
  );
  for (const slot of slots) {
    const gain = slot.inputs.find(({ role }) => role === 'gain');
    if (gain === undefined || !blended.has(gain.name)) continue;
    for (const path of slot.modules) {
      if (replaced.has(`${path}.weight`)) {
        problems.add(path, 'DoRA or a replaced weight', 'both', 'use one adapter alone at strength 1');
      }
    }
  }
  problems.throwIfAny('these adapters cannot be blended');
}
