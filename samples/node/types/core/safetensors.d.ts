/**
 * Read a whole safetensors file.
 *
 * Tensors must fill the file without holes or overlaps, each as long as its shape and dtype say.
 * @param {Uint8Array} bytes
 * @param {string} file its name, for messages
 * @returns {Map<string, PlainTensor>}
 * @throws {LoraportError} if the file is not a sound safetensors file
 */
export function parseSafetensors(bytes: Uint8Array, file: string): Map<string, PlainTensor>;
export type PlainTensor = import("./tensor_types.js").PlainTensor;
