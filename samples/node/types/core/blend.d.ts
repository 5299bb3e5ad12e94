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
export function blend(parts: [Map<string, PlainTensor>, number][], table: SlotTable, baseValues?: Map<string, PlainTensor>): Map<string, PlainTensor>;
export type SlotTable = import("./manifest.js").SlotTable;
export type SlotInput = import("./manifest.js").SlotInput;
export type PlainTensor = import("./tensor_types.js").PlainTensor;
export type Part = [PlainTensor, number];
