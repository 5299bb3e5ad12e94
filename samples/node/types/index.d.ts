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
export function openModel(directory: string, { check, session }?: {
    check?: boolean | undefined;
    session?: ort.InferenceSession.SessionOptions | undefined;
}): Promise<Model>;
/**
 * Text in, text out, with the bundle's own tokenizer and chat template.
 * @param {Model} model
 * @returns {Promise<TextGenerator>}
 * @throws {LoraportError} if the bundle has no tokenizer
 */
export function openText(model: Model): Promise<TextGenerator>;
export { directoryStore };
export type Selection = import("./core/model.js").Selection;
export type GenerateOptions = import("./core/generation.js").GenerateOptions;
export type CaseReport = import("./core/golden.js").CaseReport;
import * as ort from 'onnxruntime-node';
import { Model } from './core/index.js';
import { TextGenerator } from './core/index.js';
import { directoryStore } from './directory_store.js';
export { Bundle, LoraportError, Model, TextGenerator, checkGolden, generate } from "./core/index.js";
