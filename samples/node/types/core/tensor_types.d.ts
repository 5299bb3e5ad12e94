/**
 * The float32 value of a half's 16 bits.
 * @param {number} bits
 * @returns {number}
 */
export function halfToFloat(bits: number): number;
/**
 * A float32 value rounded to a half's 16 bits, to nearest, ties to even.
 * @param {number} value
 * @returns {number}
 */
export function floatToHalf(value: number): number;
/**
 * Numbers of any float type as float32.
 * @param {ArrayLike<number>} data halves as their bits (`Uint16Array`) or as a `Float16Array`
 * @returns {Float32Array}
 */
export function asFloat32(data: ArrayLike<number>): Float32Array;
/**
 * Is every number finite?
 * @param {PlainTensor} tensor
 * @returns {boolean}
 */
export function isFiniteTensor({ dtype, data }: PlainTensor): boolean;
/** Element types: as safetensors, ONNX and ONNX Runtime's JavaScript API call them. */
/**
 * A tensor in plain memory.
 * @typedef {object} PlainTensor
 * @property {string} dtype safetensors' name for the element type, e.g. `"F32"`
 * @property {number[]} shape
 * @property {TypedArray} data half-precision elements as their 16 bits
 */
/**
 * @typedef {Float32Array | Float64Array | Int8Array | Uint8Array | Int16Array | Uint16Array
 *   | Int32Array | Uint32Array | BigInt64Array | BigUint64Array} TypedArray
 */
/**
 * @typedef {object} ElementType
 * @property {import('onnxruntime-common').Tensor.Type | null} ort its name in ONNX Runtime's API,
 *   or null where the API has none
 * @property {new (buffer: ArrayBufferLike, offset: number, length: number) => TypedArray} array
 * @property {number} bytes of one element
 */
/** @type {ReadonlyMap<string, ElementType>} */
export const ELEMENT_TYPES: ReadonlyMap<string, ElementType>;
/** ONNX's names for the element types that slots have. */
export const SLOT_DTYPES: Map<string, string>;
/**
 * A tensor in plain memory.
 */
export type PlainTensor = {
    /**
     * safetensors' name for the element type, e.g. `"F32"`
     */
    dtype: string;
    shape: number[];
    /**
     * half-precision elements as their 16 bits
     */
    data: TypedArray;
};
export type TypedArray = Float32Array | Float64Array | Int8Array | Uint8Array | Int16Array | Uint16Array | Int32Array | Uint32Array | BigInt64Array | BigUint64Array;
export type ElementType = {
    /**
     * its name in ONNX Runtime's API,
     * or null where the API has none
     */
    ort: import("onnxruntime-common").Tensor.Type | null;
    array: new (buffer: ArrayBufferLike, offset: number, length: number) => TypedArray;
    /**
     * of one element
     */
    bytes: number;
};
