import assert from 'node:assert/strict';
import test from 'node:test';

import { blend } from '../src/core/packed_adapter.js';
import { asFloat32, floatToHalf } from '../src/core/tensor_types.js';

const SLOT = { name: 's', inputA: 's.A', inputB: 's.B', inFeatures: 5, outFeatures: 3, dtype: 'FLOAT' };
const OTHER = { ...SLOT, name: 'o', inputA: 'o.A', inputB: 'o.B' };

let state = 1;
const number = () => {
  state = (state * 48271) % 2147483647;
  return state / 2147483647 - 0.5;
};

function matrix(rows, columns, dtype = 'F32') {
  const values = Float32Array.from({ length: rows * columns }, number);
  const data = dtype === 'F16' ? Uint16Array.from(values, floatToHalf) : values;
  return { dtype, shape: [rows, columns], data };
}

function adapter(slot, rank, dtype) {
  return new Map([
    [slot.inputA, matrix(slot.inFeatures, rank, dtype)],
    [slot.inputB, matrix(rank, slot.outFeatures, dtype)],
  ]);
}

/** A times B in double precision. */
function product(tensors, slot) {
  const [a, b] = [tensors.get(slot.inputA), tensors.get(slot.inputB)];
  const [left, right] = [asFloat32(a.data), asFloat32(b.data)];
  const rank = b.shape[0];
  const result = [];
  for (let row = 0; row < slot.inFeatures; row++) {
    for (let column = 0; column < slot.outFeatures; column++) {
      let sum = 0;
      for (let k = 0; k < rank; k++) {
        sum += left[row * rank + k] * right[k * slot.outFeatures + column];
      }
      result.push(sum);
    }
  }
  return result;
}

for (const [dtype, tolerance] of [['F32', 1e-7], ['F16', 1e-3]]) {
  test(`a blend in ${dtype} is the weighted sum of its updates`, () => {
    const parts = [[adapter(SLOT, 2, dtype), 0.75], [adapter(SLOT, 4, dtype), -1.5]];
    const blended = blend(parts, [SLOT, OTHER]);
    assert.deepEqual([...blended.keys()], ['s.A', 's.B']);
    assert.deepEqual(blended.get('s.A').shape, [5, 6]);
    assert.deepEqual(blended.get('s.B').shape, [6, 3]);
    const got = product(blended, SLOT);
    const [first, second] = parts.map(([tensors]) => product(tensors, SLOT));
    got.forEach((value, index) => {
      const wanted = 0.75 * first[index] - 1.5 * second[index];
      assert.ok(Math.abs(value - wanted) <= tolerance, `${value} and ${wanted}`);
    });
    assert.ok(got.some((value, index) => Math.abs(value - first[index]) > 0.01));
  });
}

test('adapters of different slots stay apart', () => {
  const blended = blend([[adapter(SLOT, 2), 1], [adapter(OTHER, 3), 0.5]], [SLOT, OTHER]);
  assert.deepEqual(blended.get('s.A').shape, [5, 2]);
  assert.deepEqual(blended.get('o.A').shape, [5, 3]);
});

test('one adapter at full strength is taken as it is', () => {
  const only = adapter(SLOT, 2);
  assert.equal(blend([[only, 1]], [SLOT]), only);
});

test('bfloat16 is refused with what to do', () => {
  const tensors = new Map([
    ['s.A', { dtype: 'BF16', shape: [5, 1], data: new Uint16Array(5) }],
    ['s.B', { dtype: 'BF16', shape: [1, 3], data: new Uint16Array(3) }],
  ]);
  assert.throws(() => blend([[tensors, 0.5]], [SLOT]), /BF16.*--precision fp32/);
});
