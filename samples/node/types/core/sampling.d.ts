/**
 * Fill in what was not said, and refuse what makes no sense.
 * @param {Partial<Sampling>} given
 * @returns {Sampling}
 * @throws {LoraportError}
 */
export function readSampling(given: Partial<Sampling>): Sampling;
/**
 * The next token.
 * @param {Float32Array} logits one per token of the vocabulary
 * @param {Sampling} sampling
 * @param {() => number} random from 0 to 1
 * @returns {number}
 * @throws {LoraportError} if a logit is NaN, or the largest one infinite
 */
export function choose(logits: Float32Array, { temperature, topP }: Sampling, random: () => number): number;
/**
 * A seeded random number generator: 32 bits of state, advanced by a constant and then mixed.
 * @param {number} seed
 * @returns {() => number} from 0 to 1
 */
export function seededRandom(seed: number): () => number;
/**
 * @typedef {object} Sampling
 * @property {number} maxNewTokens stop after so many
 * @property {number} temperature 0 takes the likeliest token (greedy)
 * @property {number} topP sample from the smallest set of tokens whose probability reaches this
 * @property {number} seed of the sampling
 */
/** @type {Readonly<Sampling>} */
export const GREEDY: Readonly<Sampling>;
export type Sampling = {
    /**
     * stop after so many
     */
    maxNewTokens: number;
    /**
     * 0 takes the likeliest token (greedy)
     */
    temperature: number;
    /**
     * sample from the smallest set of tokens whose probability reaches this
     */
    topP: number;
    /**
     * of the sampling
     */
    seed: number;
};
