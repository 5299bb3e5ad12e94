/**
 * @typedef {object} Decoder
 * @property {[string, string][]} cache input and output name of each part of the KV cache
 * @property {[number, number, number, number]} emptyCache its shape before the first token
 * @property {Set<number>} stopIds tokens that end the text
 * @property {number} contextLength most tokens that fit
 * @property {number} vocabulary number of tokens that there are
 */
/**
 * Read it from a bundle.
 * @param {import('./bundle.js').Bundle} bundle
 * @returns {Promise<Decoder>}
 * @throws {LoraportError} if the bundle is no decoder language model
 */
export function readDecoder(bundle: import("./bundle.js").Bundle): Promise<Decoder>;
export type Decoder = {
    /**
     * input and output name of each part of the KV cache
     */
    cache: [string, string][];
    /**
     * its shape before the first token
     */
    emptyCache: [number, number, number, number];
    /**
     * tokens that end the text
     */
    stopIds: Set<number>;
    /**
     * most tokens that fit
     */
    contextLength: number;
    /**
     * number of tokens that there are
     */
    vocabulary: number;
};
