import assert from 'node:assert/strict';
import test from 'node:test';

import { choose, readSampling, seededRandom } from '../src/core/sampling.js';

const LOGITS = Float32Array.of(0, 2, 1, -3);

test('greedy takes the likeliest', () => {
  assert.equal(choose(LOGITS, readSampling({}), () => 0.99), 1);
});

test('sampling follows the probabilities', () => {
  const sampling = readSampling({ temperature: 0.7 });
  const random = seededRandom(3);
  const counts = [0, 0, 0, 0];
  for (let turn = 0; turn < 20000; turn++) counts[choose(LOGITS, sampling, random)] += 1;
  const weights = [...LOGITS].map((logit) => Math.exp(logit / 0.7));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  // Four standard deviations of a share over 20000 draws are at most 0.0142.
  counts.forEach((count, token) => {
    assert.ok(Math.abs(count / 20000 - weights[token] / total) < 0.0142, `token ${token}`);
  });
});

test('top-p leaves out the tail', () => {
  const sampling = readSampling({ temperature: 1, topP: 0.8 });
  const random = seededRandom(5);
  const seen = new Set();
  for (let turn = 0; turn < 500; turn++) seen.add(choose(LOGITS, sampling, random));
  assert.deepEqual([...seen].sort(), [1, 2]);
});

for (const logits of [[NaN, 1], [1, NaN], [1, Infinity], [-Infinity, -Infinity]]) {
  test(`logits ${logits} are refused`, () => {
    for (const temperature of [0, 1]) {
      const sampling = readSampling({ temperature });
      assert.throws(
        () => choose(Float32Array.from(logits), sampling, () => 0.5),
        /^LoraportError: logits: expected finite numbers, got -?(NaN|Infinity)/,
      );
    }
  });
}

test('a logit of minus infinity is a token that never comes', () => {
  assert.equal(choose(Float32Array.of(-Infinity, 0), readSampling({ temperature: 9 }), () => 0), 1);
});

test('the same seed gives the same numbers, another gives others', () => {
  const take = (seed) => Array.from({ length: 5 }, seededRandom(seed));
  assert.deepEqual(take(7), take(7));
  assert.notDeepEqual(take(7), take(8));
});

for (const wrong of [{ temperature: -1 }, { temperature: NaN }, { topP: 0 }, { topP: 1.1 }, { maxNewTokens: 0 }, { maxNewTokens: 1.5 }, { seed: 0.5 }]) {
  test(`${JSON.stringify(wrong)} is refused by name`, () => {
    const [name] = Object.keys(wrong);
    assert.throws(() => readSampling(wrong), new RegExp(`^LoraportError: ${name}: expected`));
  });
}
