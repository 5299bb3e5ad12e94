/**
 * @typedef {import('./model.js').Model} Model
 * @typedef {import('onnxruntime-common').Tensor} Tensor
 */
/**
 * @typedef {object} Choice
 * @property {import('./model.js').Selection} [adapter] for this text; the one that is set, if left out
 * @property {AbortSignal} [signal] stops before the next token
 *
 * @typedef {Partial<import('./sampling.js').Sampling> & Choice} GenerateOptions
 */
/**
 * Yield new tokens one by one, until a stop token or `maxNewTokens`.
 *
 * Each text has its own cache and keeps the adapter it began with, so several may be generated
 * in turns with different adapters. Where a longer text is rotated by other factors (longrope), the
 * cache is computed anew once as many tokens are there.
 * @param {Model} model
 * @param {readonly number[]} tokenIds the prompt, at least one token
 * @param {GenerateOptions} [options]
 * @returns {AsyncGenerator<number, void, void>}
 * @throws {LoraportError} if the prompt is empty, too long or not of tokens, or the bundle is no
 *   decoder
 */
export function generate(model: Model, tokenIds: readonly number[], { adapter, signal, ...given }?: GenerateOptions): AsyncGenerator<number, void, void>;
export type Model = import("./model.js").Model;
export type Tensor = import("onnxruntime-common").Tensor;
export type Choice = {
    /**
     * for this text; the one that is set, if left out
     */
    adapter?: import("./model.js").Selection | undefined;
    /**
     * stops before the next token
     */
    signal?: AbortSignal | undefined;
};
export type GenerateOptions = Partial<import("./sampling.js").Sampling> & Choice;
