/** Text in, text out: a bundle's tokenizer and chat template. */

import { LoraportError } from './errors.js';
import { generate } from './generation.js';

/**
 * The two classes that do the work, from `@huggingface/tokenizers` and `@huggingface/jinja`.
 * @typedef {object} TextLibraries
 * @property {typeof import('@huggingface/tokenizers').Tokenizer} Tokenizer
 * @property {typeof import('@huggingface/jinja').Template} Template
 */

// What a decoder gives for a character whose last bytes have not come yet.
const INCOMPLETE = '\uFFFD';

export class TextGenerator {
  /**
   * Use `TextGenerator.open`.
   * @param {import('./model.js').Model} model
   * @param {import('@huggingface/tokenizers').Tokenizer} tokenizer
   * @param {((prompt: string) => string) | null} chat wraps what a user says
   */
  constructor(model, tokenizer, chat) {
    this.model = model;
    this.tokenizer = tokenizer;
    this.chat = chat;
  }

  /**
   * Read a bundle's tokenizer.
   * @param {import('./model.js').Model} model
   * @param {TextLibraries} libraries
   * @returns {Promise<TextGenerator>}
   * @throws {LoraportError} if the bundle has none
   */
  static async open(model, { Tokenizer, Template }) {
    const { bundle } = model;
    const definition = await bundle.readJson('tokenizer.json');
    if (definition === undefined) {
      throw new LoraportError(
        `${bundle.store.name}: expected a bundle with tokenizer.json, got none; give token ids`,
      );
    }
    const config = (await bundle.readJson('tokenizer_config.json')) ?? {};
    const source = (await bundle.readText('chat_template.jinja')) ?? config.chat_template;
    let chat = null;
    if (typeof source === 'string') {
      const template = new Template(source);
      /** @param {string} prompt */
      chat = (prompt) =>
        template.render({
          messages: [{ role: 'user', content: prompt }],
          add_generation_prompt: true,
          bos_token: tokenText(config.bos_token),
          eos_token: tokenText(config.eos_token),
        });
    }
    return new TextGenerator(model, new Tokenizer(definition, config), chat);
  }

  /**
   * A prompt's tokens.
   * @param {string} prompt what the user says
   * @param {object} [options]
   * @param {boolean} [options.chat] wrap it in the model's chat template, if it has one
   * @returns {number[]}
   * @throws {LoraportError} if the prompt is no text
   */
  tokens(prompt, { chat = true } = {}) {
    if (typeof prompt !== 'string') {
      throw new LoraportError(`prompt: expected a text, got ${prompt === null ? 'null' : typeof prompt}`);
    }
    if (chat && this.chat !== null) {
      return this.tokenizer.encode(this.chat(prompt), { add_special_tokens: false }).ids;
    }
    return this.tokenizer.encode(prompt).ids;
  }

  /**
   * Yield the text piece by piece, as it is generated.
   * @param {string} prompt
   * @param {import('./generation.js').GenerateOptions & {chat?: boolean}} [options]
   * @returns {AsyncGenerator<string, void, void>}
   * @throws {LoraportError} if the prompt is no text, empty or too long, or the adapter unknown
   */
  async *stream(prompt, { chat = true, ...options } = {}) {
    if (prompt === '') throw new LoraportError('prompt: expected some text, got none');
    /** @type {number[]} */
    const tokens = [];
    let shown = '';
    let text = '';
    for await (const token of generate(this.model, this.tokens(prompt, { chat }), options)) {
      tokens.push(token);
      text = this.tokenizer.decode(tokens, { skip_special_tokens: true });
      if (text.endsWith(INCOMPLETE)) continue;
      yield text.slice(shown.length);
      shown = text;
    }
    // A character that never became complete is shown as such.
    if (text.length > shown.length) yield text.slice(shown.length);
  }

  /**
   * The whole text; see `stream`.
   * @param {string} prompt
   * @param {import('./generation.js').GenerateOptions & {chat?: boolean}} [options]
   * @returns {Promise<string>}
   */
  async generate(prompt, options) {
    let text = '';
    for await (const piece of this.stream(prompt, options)) text += piece;
    return text;
  }
}

/**
 * @param {any} token as tokenizer_config.json has it: a text, or an object with one
 * @returns {string}
 */
function tokenText(token) {
  return typeof token === 'string' ? token : (token?.content ?? '');
}
