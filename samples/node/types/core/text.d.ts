export class TextGenerator {
    /**
     * Read a bundle's tokenizer.
     * @param {import('./model.js').Model} model
     * @param {TextLibraries} libraries
     * @returns {Promise<TextGenerator>}
     * @throws {LoraportError} if the bundle has none
     */
    static open(model: import("./model.js").Model, { Tokenizer, Template }: TextLibraries): Promise<TextGenerator>;
    /**
     * Use `TextGenerator.open`.
     * @param {import('./model.js').Model} model
     * @param {import('@huggingface/tokenizers').Tokenizer} tokenizer
     * @param {((prompt: string) => string) | null} chat wraps what a user says
     */
    constructor(model: import("./model.js").Model, tokenizer: any, chat: ((prompt: string) => string) | null);
    model: import("./model.js").Model;
    tokenizer: any;
    chat: ((prompt: string) => string) | null;
    /**
     * A prompt's tokens.
     * @param {string} prompt what the user says
     * @param {object} [options]
     * @param {boolean} [options.chat] wrap it in the model's chat template, if it has one
     * @returns {number[]}
     * @throws {LoraportError} if the prompt is no text
     */
    tokens(prompt: string, { chat }?: {
        chat?: boolean | undefined;
    }): number[];
    /**
     * Yield the text piece by piece, as it is generated.
     * @param {string} prompt
     * @param {import('./generation.js').GenerateOptions & {chat?: boolean}} [options]
     * @returns {AsyncGenerator<string, void, void>}
     * @throws {LoraportError} if the prompt is no text, empty or too long, or the adapter unknown
     */
    stream(prompt: string, { chat, ...options }?: import("./generation.js").GenerateOptions & {
        chat?: boolean;
    }): AsyncGenerator<string, void, void>;
    /**
     * The whole text; see `stream`.
     * @param {string} prompt
     * @param {import('./generation.js').GenerateOptions & {chat?: boolean}} [options]
     * @returns {Promise<string>}
     */
    generate(prompt: string, options?: import("./generation.js").GenerateOptions & {
        chat?: boolean;
    }): Promise<string>;
}
/**
 * The two classes that do the work, from `@huggingface/tokenizers` and `@huggingface/jinja`.
 */
export type TextLibraries = {
    Tokenizer: typeof import("@huggingface/tokenizers").Tokenizer;
    Template: typeof import("@huggingface/jinja").Template;
};
