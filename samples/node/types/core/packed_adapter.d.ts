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
export function requireFit(tensors: Map<string, PlainTensor>, slots: Slot[], file: string): void;
/**
 * Tensors that equal the weighted sum of several adapters.
 *
 * Ranks are concatenated and each strength is multiplied into its B, so the result is exactly
 * `Σ strength · update`, with one rounding of B.
 * @param {[Map<string, PlainTensor>, number][]} parts tensors and strength of each adapter
 * @param {Slot[]} slots
 * @returns {Map<string, PlainTensor>}
 */
export function blend(parts: [Map<string, PlainTensor>, number][], slots: Slot[]): Map<string, PlainTensor>;
/**
 * What a slot without an adapter is fed: zeros of rank 1, which add nothing.
 * @param {Slot} slot
 * @returns {[PlainTensor, PlainTensor]} A and B
 */
export function zeroUpdate(slot: Slot): [PlainTensor, PlainTensor];
export type Slot = import("./manifest.js").Slot;
export type PlainTensor = import("./tensor_types.js").PlainTensor;
export type TypedArray = import("./tensor_types.js").TypedArray;
