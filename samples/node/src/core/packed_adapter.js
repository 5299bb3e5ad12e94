/** Packed adapters: tensors named like the inputs they fill, scaling folded into B. */

import { LoraportError, Problems } from './errors.js';
import { ELEMENT_TYPES, SLOT_DTYPES, floatToHalf, isFiniteTensor } from './tensor_types.js';

/**
 * @typedef {import('./manifest.js').Slot} Slot
 * @typedef {import('./manifest.js').SlotTable} SlotTable
 * @typedef {import('./manifest.js').SlotInput} SlotInput
 * @typedef {import('./tensor_types.js').PlainTensor} PlainTensor
 */

/**
 * Check that tensors fit the slots.
 * @param {Map<string, PlainTensor>} tensors
 * @param {SlotTable} table
 * @param {string} file for messages
 * @throws {LoraportError} naming every tensor that has no slot or does not fit it
 */
export function requireFit(tensors, { slots, replacements }, file) {
  const problems = new Problems();
  const known = new Set(slots.flatMap((slot) => slot.inputs.map(({ name }) => name)));
  for (const { input } of replacements) known.add(input);
  for (const [name, tensor] of tensors) {
    if (!known.has(name)) problems.add(name, 'a slot input of this bundle', 'none of this name');
    if (!isFiniteTensor(tensor)) problems.add(name, 'finite numbers', 'NaN or infinity');
  }
  for (const slot of slots) requireSlot(slot, tensors, problems);
  for (const { input, shape, dtype } of replacements) {
    const tensor = tensors.get(input);
    if (tensor === undefined) continue;
    if (!sameShape(shape, tensor.shape)) problems.add(input, shown(shape), shown(tensor.shape));
    if (tensor.dtype !== SLOT_DTYPES.get(dtype)) {
      problems.add(input, `${dtype} elements`, tensor.dtype);
    }
  }
  problems.throwIfAny(`${file} does not fit the bundle's slots`);
}

/**
 * What an input is fed where there is no adapter: its neutral number, in rank 1.
 * @param {SlotInput} input
 * @param {string} slotType ONNX's name for the element type
 * @returns {PlainTensor}
 */
export function neutralTensor({ name, shape, neutral }, slotType) {
  const dtype = SLOT_DTYPES.get(slotType) ?? '';
  const tensor = emptyTensor(dtype, shape.map((size) => size ?? 1), name);
  if (neutral !== 0) {
    const half = dtype === 'F16';
    /** @type {any} */ (tensor.data).fill(half ? floatToHalf(neutral) : neutral);
  }
  return tensor;
}

/**
 * A tensor of zeros.
 * @param {string} dtype
 * @param {number[]} shape
 * @param {string} subject for messages
 * @returns {PlainTensor}
 */
export function emptyTensor(dtype, shape, subject) {
  const type = ELEMENT_TYPES.get(dtype);
  if (type === undefined) {
    throw new LoraportError(`${subject}: expected float elements, got ${dtype || 'others'}`);
  }
  const count = shape.reduce((product, size) => product * size, 1);
  return { dtype, shape, data: new type.array(new ArrayBuffer(count * type.bytes), 0, count) };
}

/**
 * @param {Slot} slot
 * @param {Map<string, PlainTensor>} tensors
 * @param {Problems} problems
 */
function requireSlot(slot, tensors, problems) {
  const filled = slot.inputs.filter(({ name }) => tensors.has(name));
  if (filled.length === 0) return;
  const ranks = new Set();
  let fits = true;
  for (const { role, name, shape } of slot.inputs) {
    const tensor = tensors.get(name);
    if (tensor === undefined) {
      if (role === 'lora_A' || role === 'lora_B') {
        problems.add(name, 'the partner of the other matrix', 'no such tensor');
        return;
      }
      continue;
    }
    fits &&= sameShape(shape, tensor.shape);
    const axis = shape.indexOf(null);
    if (axis >= 0) ranks.add(tensor.shape[axis]);
    if (tensor.dtype !== SLOT_DTYPES.get(slot.dtype)) {
      problems.add(name, `${slot.dtype} elements`, tensor.dtype);
    }
  }
  if (!fits || ranks.size > 1) {
    const wanted = filled.map(({ shape }) => shown(shape)).join(' and ');
    const got = filled.map(({ name }) => shown(tensors.get(name)?.shape ?? [])).join(' and ');
    problems.add(slot.name, wanted, got);
  }
}

/**
 * @param {readonly (number | null)[]} wanted null for any rank above 0
 * @param {readonly number[]} got
 */
const sameShape = (wanted, got) =>
  wanted.length === got.length &&
  wanted.every((size, index) => (size === null ? Number(got[index]) > 0 : size === got[index]));

/** @param {readonly (number | null)[]} shape */
const shown = (shape) => `[${shape.map((size) => size ?? 'r').join(', ')}]`;
