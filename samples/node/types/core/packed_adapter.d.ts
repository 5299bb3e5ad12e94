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
export function requireFit(tensors: Map<string, PlainTensor>, { slots, replacements }: SlotTable, file: string): void;
/**
 * What an input is fed where there is no adapter: its neutral number, in rank 1.
 * @param {SlotInput} input
 * @param {string} slotType ONNX's name for the element type
 * @returns {PlainTensor}
 */
export function neutralTensor({ name, shape, neutral }: SlotInput, slotType: string): PlainTensor;
/**
 * A tensor of zeros.
 * @param {string} dtype
 * @param {number[]} shape
 * @param {string} subject for messages
 * @returns {PlainTensor}
 */
export function emptyTensor(dtype: string, shape: number[], subject: string): PlainTensor;
export type Slot = import("./manifest.js").Slot;
export type SlotTable = import("./manifest.js").SlotTable;
export type SlotInput = import("./manifest.js").SlotInput;
export type PlainTensor = import("./tensor_types.js").PlainTensor;
