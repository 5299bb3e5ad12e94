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
export const ELEMENT_TYPES = new Map([
  ['F32', { ort: 'float32', array: Float32Array, bytes: 4 }],
  ['F16', { ort: 'float16', array: Uint16Array, bytes: 2 }],
  ['BF16', { ort: null, array: Uint16Array, bytes: 2 }],
  ['F64', { ort: 'float64', array: Float64Array, bytes: 8 }],
  ['I64', { ort: 'int64', array: BigInt64Array, bytes: 8 }],
  ['I32', { ort: 'int32', array: Int32Array, bytes: 4 }],
  ['I16', { ort: 'int16', array: Int16Array, bytes: 2 }],
  ['I8', { ort: 'int8', array: Int8Array, bytes: 1 }],
  ['U64', { ort: 'uint64', array: BigUint64Array, bytes: 8 }],
  ['U32', { ort: 'uint32', array: Uint32Array, bytes: 4 }],
  ['U16', { ort: 'uint16', array: Uint16Array, bytes: 2 }],
  ['U8', { ort: 'uint8', array: Uint8Array, bytes: 1 }],
  ['BOOL', { ort: 'bool', array: Uint8Array, bytes: 1 }],
]);

/** ONNX's names for the element types that slots have. */
export const SLOT_DTYPES = new Map([
  ['FLOAT', 'F32'],
  ['FLOAT16', 'F16'],
  ['BFLOAT16', 'BF16'],
  ['DOUBLE', 'F64'],
]);

/**
 * The float32 value of a half's 16 bits.
 * @param {number} bits
 * @returns {number}
 */
export function halfToFloat(bits) {
  const sign = bits & 0x8000 ? -1 : 1;
  const exponent = (bits >> 10) & 0x1f;
  const fraction = bits & 0x3ff;
  if (exponent === 0) return sign * fraction * 2 ** -24;
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (1 + fraction / 1024) * 2 ** (exponent - 15);
}

const floats = new Float32Array(1);
const words = new Uint32Array(floats.buffer);

/**
 * A float32 value rounded to a half's 16 bits, to nearest, ties to even.
 * @param {number} value
 * @returns {number}
 */
export function floatToHalf(value) {
  floats[0] = value;
  const word = /** @type {number} */ (words[0]);
  const sign = (word >>> 16) & 0x8000;
  const magnitude = word & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;
  if (magnitude >= 0x47800000) return sign | 0x7c00;
  if (magnitude < 0x38800000) {
    // Below the smallest normal half, halves are multiples of 2^-24.
    return sign | roundTiesToEven(Math.abs(floats[0]) * 2 ** 24);
  }
  const shifted = magnitude - 0x38000000;
  return sign | ((shifted + 0xfff + ((shifted >>> 13) & 1)) >>> 13);
}

/** @param {number} value */
function roundTiesToEven(value) {
  const below = Math.floor(value);
  const rest = value - below;
  return below + Number(rest > 0.5 || (rest === 0.5 && below % 2 === 1));
}

/**
 * Numbers of any float type as float32.
 * @param {ArrayLike<number>} data halves as their bits (`Uint16Array`) or as a `Float16Array`
 * @returns {Float32Array}
 */
export function asFloat32(data) {
  if (data instanceof Float32Array) return data;
  if (data instanceof Uint16Array) return Float32Array.from(data, halfToFloat);
  return Float32Array.from(data);
}

/**
 * Is every number finite?
 * @param {PlainTensor} tensor
 * @returns {boolean}
 */
export function isFiniteTensor({ dtype, data }) {
  if (data instanceof Uint16Array) {
    const exponent = dtype === 'BF16' ? 0x7f80 : 0x7c00;
    return (dtype !== 'F16' && dtype !== 'BF16') || data.every((bits) => (bits & exponent) !== exponent);
  }
  if (data instanceof Float32Array || data instanceof Float64Array) return data.every(Number.isFinite);
  return true;
}
