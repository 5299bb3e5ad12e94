/** How the next token is chosen. */

import { LoraportError } from './errors.js';

/**
 * @typedef {object} Sampling
 * @property {number} maxNewTokens stop after so many
 * @property {number} temperature 0 takes the likeliest token (greedy)
 * @property {number} topP sample from the smallest set of tokens whose probability reaches this
 * @property {number} seed of the sampling
 */

/** @type {Readonly<Sampling>} */
export const GREEDY = Object.freeze({ maxNewTokens: 128, temperature: 0, topP: 1, seed: 0 });

/**
 * Fill in what was not said, and refuse what makes no sense.
 * @param {Partial<Sampling>} given
 * @returns {Sampling}
 * @throws {LoraportError}
 */
export function readSampling(given) {
  const sampling = { ...GREEDY, ...given };
  const { maxNewTokens, temperature, topP, seed } = sampling;
  /** @type {(good: boolean, name: string, expected: string, got: number) => void} */
  const require = (good, name, expected, got) => {
    if (!good) throw new LoraportError(`${name}: expected ${expected}, got ${got}`);
  };
  require(Number.isInteger(maxNewTokens) && maxNewTokens > 0, 'maxNewTokens', '1 or more', maxNewTokens);
  require(Number.isFinite(temperature) && temperature >= 0, 'temperature', '0 or more', temperature);
  require(topP > 0 && topP <= 1, 'topP', 'more than 0, at most 1', topP);
  require(Number.isInteger(seed), 'seed', 'a whole number', seed);
  return sampling;
}

/**
 * The next token.
 * @param {Float32Array} logits one per token of the vocabulary
 * @param {Sampling} sampling
 * @param {() => number} random from 0 to 1
 * @returns {number}
 * @throws {LoraportError} if a logit is NaN, or the largest one infinite
 */
export function choose(logits, { temperature, topP }, random) {
  const likeliest = argmax(logits);
  const largest = logits.some(Number.isNaN) ? NaN : Number(logits[likeliest]);
  if (!Number.isFinite(largest)) {
    throw new LoraportError(
      `logits: expected finite numbers, got ${largest}; the adapters' strengths may be too large`,
    );
  }
  if (temperature === 0) return likeliest;
  const weights = Float64Array.from(logits, (logit) => Math.exp((logit - largest) / temperature));
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  const order = Uint32Array.from(weights.keys()).sort(
    (a, b) => Number(weights[b]) - Number(weights[a]),
  );
  let kept = 0;
  let mass = 0;
  while (kept < order.length && (kept === 0 || mass < topP * total)) {
    mass += Number(weights[Number(order[kept++])]);
  }
  let left = random() * mass;
  for (let rank = 0; rank < kept; rank++) {
    left -= Number(weights[Number(order[rank])]);
    if (left < 0) return Number(order[rank]);
  }
  return likeliest;
}

/**
 * A seeded random number generator: 32 bits of state, advanced by a constant and then mixed.
 * @param {number} seed
 * @returns {() => number} from 0 to 1
 */
export function seededRandom(seed) {
  let state = seed >>> 0;
  return () => {
    state = (state + 0x9e3779b9) >>> 0;
    let mixed = Math.imul(state ^ (state >>> 16), 0x21f0aaad);
    mixed = Math.imul(mixed ^ (mixed >>> 15), 0x735a2d97);
    return ((mixed ^ (mixed >>> 15)) >>> 0) / 2 ** 32;
  };
}

/** @param {Float32Array} values */
function argmax(values) {
  let best = 0;
  for (let index = 1; index < values.length; index++) {
    if (Number(values[index]) > Number(values[best])) best = index;
  }
  return best;
}
