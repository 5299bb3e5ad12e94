/** Run a loraport bundle on onnxruntime-node and swap its adapters. */

import { join } from 'node:path';

import { Template } from '@huggingface/jinja';
import { Tokenizer } from '@huggingface/tokenizers';
import * as ort from 'onnxruntime-node';

import { Bundle, LoraportError, Model, TextGenerator, firstLine } from './core/index.js';
import { directoryStore } from './directory_store.js';

export { Bundle, LoraportError, Model, TextGenerator, checkGolden, generate } from './core/index.js';
export { directoryStore };

/**
 * @typedef {import('./core/model.js').Selection} Selection
 * @typedef {import('./core/generation.js').GenerateOptions} GenerateOptions
 * @typedef {import('./core/golden.js').CaseReport} CaseReport
 */

/**
 * Open a bundle's model. Every file is compared with its sha256 first.
 * @param {string} directory the bundle
 * @param {object} [options]
 * @param {boolean} [options.check] false skips the comparison of files that are not read
 * @param {import('onnxruntime-node').InferenceSession.SessionOptions} [options.session]
 *   e.g. `{ executionProviders: ['cuda'], intraOpNumThreads: 2 }`
 * @returns {Promise<Model>}
 * @throws {LoraportError} if the bundle is damaged or the model cannot be opened
 */
export async function openModel(directory, { check = true, session = {} } = {}) {
  const bundle = await Bundle.open(directoryStore(directory));
  if (check) await bundle.checkFiles();
  const file = join(directory, bundle.manifest.model);
  try {
    const opened = await ort.InferenceSession.create(file, { logSeverityLevel: 3, ...session });
    return new Model(ort, opened, bundle);
  } catch (error) {
    if (error instanceof LoraportError) throw error;
    throw new LoraportError(`${file}: ONNX Runtime cannot open it: ${firstLine(error)}`, {
      cause: error,
    });
  }
}

/**
 * Text in, text out, with the bundle's own tokenizer and chat template.
 * @param {Model} model
 * @returns {Promise<TextGenerator>}
 * @throws {LoraportError} if the bundle has no tokenizer
 */
export function openText(model) {
  return TextGenerator.open(model, { Tokenizer, Template });
}
