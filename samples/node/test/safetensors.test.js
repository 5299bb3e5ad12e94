import assert from 'node:assert/strict';
import test from 'node:test';

import { LoraportError } from '../src/core/index.js';
import { parseSafetensors } from '../src/core/safetensors.js';
import { asFloat32, floatToHalf, halfToFloat } from '../src/core/tensor_types.js';

/** A safetensors file of a header and some bytes. */
function file(header, bytes) {
  const text = new TextEncoder().encode(typeof header === 'string' ? header : JSON.stringify(header));
  const whole = new Uint8Array(8 + text.length + bytes);
  new DataView(whole.buffer).setBigUint64(0, BigInt(text.length), true);
  whole.set(text, 8);
  return whole;
}

const entry = (shape, begin, end, dtype = 'F32') => ({ dtype, shape, data_offsets: [begin, end] });

test('tensors are read where they lie, aligned or not', () => {
  const whole = file({ a: entry([3], 1, 13), pad: entry([1], 0, 1, 'U8') }, 13);
  new DataView(whole.buffer).setFloat32(whole.length - 4, 2.5, true);
  const a = parseSafetensors(whole, 'f').get('a');
  assert.deepEqual([...a.data], [0, 0, 2.5]);
  assert.deepEqual(a.shape, [3]);
});

test('empty tensors and metadata are fine', () => {
  const header = { __metadata__: { a: 'b' }, e: entry([1, 3, 0, 64], 0, 0), f: entry([1], 0, 4) };
  const tensors = parseSafetensors(file(header, 4), 'f');
  assert.deepEqual([...tensors.keys()], ['e', 'f']);
  assert.equal(tensors.get('e').data.length, 0);
});

for (const [what, bytes] of Object.entries({
  'an empty file': new Uint8Array(),
  'a header past the end': file({}, 0).fill(0xff, 0, 4),
  'a header that is no JSON': file('{"a"', 0),
  'a header that is a list': file('[]', 0),
  'a key that occurs twice': file('{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"\\u0061":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}', 1),
  'a tensor past the end': file({ a: entry([2], 0, 8) }, 4),
  'a hole': file({ a: entry([1], 4, 8) }, 8),
  'an overlap': file({ a: entry([2], 0, 8), b: entry([2], 4, 12) }, 12),
  'bytes left over': file({ a: entry([1], 0, 4) }, 5),
  'a shape of another size': file({ a: entry([3], 0, 8) }, 8),
  'a shape that overflows': file({ a: entry([2 ** 32, 2 ** 32], 0, 0) }, 0),
  'a negative size': file({ a: entry([-1, -1], 0, 4) }, 4),
  'an unknown dtype': file({ a: entry([1], 0, 4, 'Q7') }, 4),
  'an entry that is null': file({ a: null }, 0),
})) {
  test(`${what} is refused`, () => {
    assert.throws(() => parseSafetensors(bytes, 'x.safetensors'), (error) => {
      assert.ok(error instanceof LoraportError);
      assert.match(error.message, /^x\.safetensors: expected a sound safetensors file, got /);
      return true;
    });
  });
}

test('every half survives the way to float32 and back', () => {
  for (let bits = 0; bits < 0x10000; bits++) {
    const value = halfToFloat(bits);
    if (Number.isNaN(value)) assert.ok(Number.isNaN(halfToFloat(floatToHalf(value))));
    else assert.equal(floatToHalf(value), bits);
  }
});

test('floats between two halves go to the nearest, ties to even', () => {
  for (let bits = 0; bits < 0x7bff; bits++) {
    const [low, high] = [halfToFloat(bits), halfToFloat(bits + 1)];
    const middle = (low + high) / 2;
    assert.equal(floatToHalf(middle), bits % 2 === 0 ? bits : bits + 1);
    assert.equal(floatToHalf(low + (high - low) * 0.25), bits);
    assert.equal(floatToHalf(low + (high - low) * 0.75), bits + 1);
  }
  assert.equal(floatToHalf(65520), 0x7c00);
  assert.equal(floatToHalf(65519), 0x7bff);
});

test('halves come as bits or, in newer engines, as numbers', () => {
  assert.deepEqual([...asFloat32(Uint16Array.of(0x3c00, 0xc000))], [1, -2]);
});
