import assert from 'node:assert/strict';
import test from 'node:test';

import { blend } from '../src/core/blend.js';
import { asFloat32, floatToHalf } from '../src/core/tensor_types.js';

function slotOf(name) {
  const inputs = [
    { role: 'lora_A', name: `${name}.A`, shape: [5, null], neutral: 0 },
    { role: 'lora_B', name: `${name}.B`, shape: [null, 3], neutral: 0 },
    { role: 'gain', name: `${name}.gain`, shape: [3], neutral: 1 },
  ];
  const names = { inputA: `${name}.A`, inputB: `${name}.B`, inFeatures: 5, outFeatures: 3 };
  return { name, inputs, modules: [name], dtype: 'FLOAT', ...names };
}
const SLOT = slotOf('s');
const OTHER = slotOf('o');
const table = (...slots) => ({ slots, replacements: [], controls: [] });

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
    const blended = blend(parts, table(SLOT, OTHER));
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
  const blended = blend([[adapter(SLOT, 2), 1], [adapter(OTHER, 3), 0.5]], table(SLOT, OTHER));
  assert.deepEqual(blended.get('s.A').shape, [5, 2]);
  assert.deepEqual(blended.get('o.A').shape, [5, 3]);
});

test('one adapter at full strength is taken as it is', () => {
  const only = adapter(SLOT, 2);
  assert.equal(blend([[only, 1]], table(SLOT)), only);
});

test('bfloat16 is refused with what to do', () => {
  const tensors = new Map([
    ['s.A', { dtype: 'BF16', shape: [5, 1], data: new Uint16Array(5) }],
    ['s.B', { dtype: 'BF16', shape: [1, 3], data: new Uint16Array(3) }],
  ]);
  assert.throws(() => blend([[tensors, 0.5]], table(SLOT)), /BF16.*--precision fp32/);
});

const vector = (...values) => ({ dtype: 'F32', shape: [3], data: Float32Array.from(values) });

test('gains move from one, whole parameters from the base', () => {
  const replacement = { parameter: 'n.weight', input: 'n.saved', shape: [3], dtype: 'FLOAT' };
  const all = { ...table(SLOT), replacements: [replacement] };
  const base = new Map([['n.saved', vector(1, 2, 3)]]);
  const first = new Map([...adapter(SLOT, 2), ['s.gain', vector(2, 1, 0)]]);
  const second = new Map([['n.saved', vector(5, 2, 0)]]);
  const blended = blend([[first, 0.5], [second, -1]], all, base);
  assert.deepEqual([...blended.get('s.gain').data], [1.5, 1, 0.5]);
  assert.deepEqual([...blended.get('n.saved').data], [-3, 2, 6]);
  assert.equal(blend([[first, 0.5], [second, 1]], all, base).get('n.saved'), second.get('n.saved'));
});

test('a gain on a replaced weight is refused in a blend', () => {
  const replacement = { parameter: 's.weight', input: 's.saved', shape: [3], dtype: 'FLOAT' };
  const all = { ...table(SLOT), replacements: [replacement] };
  const both = new Map([...adapter(SLOT, 2), ['s.gain', vector(2, 1, 0)], ['s.saved', vector(1, 1, 1)]]);
  assert.equal(blend([[both, 1]], all), both);
  const base = new Map([['s.saved', vector(0, 0, 0)]]);
  assert.throws(() => blend([[both, 0.5]], all, base), /DoRA or a replaced weight, got both/);
});

test('a kernel of a convolution is joined along its rank', () => {
  const conv = {
    ...SLOT,
    inputs: [
      { role: 'lora_A', name: 's.A', shape: [null, 2, 2], neutral: 0 },
      { role: 'lora_B', name: 's.B', shape: [2, null, 1], neutral: 0 },
    ],
  };
  const of = (rank, start) => new Map([
    ['s.A', { dtype: 'F32', shape: [rank, 2, 2], data: Float32Array.from({ length: 4 * rank }, (_, i) => start + i) }],
    ['s.B', { dtype: 'F32', shape: [2, rank, 1], data: Float32Array.from({ length: 2 * rank }, (_, i) => start + i) }],
  ]);
  const blended = blend([[of(1, 0), 1], [of(2, 10), 2]], table(conv));
  assert.deepEqual(blended.get('s.A').shape, [3, 2, 2]);
  assert.deepEqual([...blended.get('s.A').data], [0, 1, 2, 3, 10, 11, 12, 13, 14, 15, 16, 17]);
  assert.deepEqual(blended.get('s.B').shape, [2, 3, 1]);
  assert.deepEqual([...blended.get('s.B').data], [0, 20, 22, 1, 24, 26]);
});
