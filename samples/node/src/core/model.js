/** A bundle's session: one model, any of its adapters. */

import { LoraportError, Problems, firstLine } from './errors.js';
import { requireAdapter } from './manifest.js';
import { blend } from './blend.js';
import { neutralTensor } from './packed_adapter.js';
import { ELEMENT_TYPES, SLOT_DTYPES } from './tensor_types.js';

/**
 * @typedef {import('onnxruntime-common').InferenceSession} Session
 * @typedef {import('onnxruntime-common').Tensor} Tensor
 * @typedef {import('./tensor_types.js').PlainTensor} PlainTensor
 */

/**
 * The part of ONNX Runtime's API that is needed; `onnxruntime-node` and `-web` both have it.
 * @typedef {object} Ort
 * @property {typeof import('onnxruntime-common').Tensor} Tensor
 */

/**
 * An adapter's name, several with a strength each, or null for the base.
 * @typedef {string | Record<string, number> | null} Selection
 */

/**
 * What the slots are fed for a selection; kept and used again by whoever asked for it.
 * @typedef {Readonly<Record<string, Tensor>>} SlotFeeds
 */

export class Model {
  /** @type {SlotFeeds} */
  #current;
  /** @type {Selection} */
  #selection = null;
  /** How many times an adapter was asked for, and which of these was set last. */
  #asked = 0;
  #set = 0;
  #zeros;
  /** A run at a time: a session in a browser takes no second one. @type {Promise<unknown>} */
  #lastRun = Promise.resolve();

  /**
   * @param {Ort} ort
   * @param {Session} session over the bundle's `model_required` graph
   * @param {import('./bundle.js').Bundle} bundle
   */
  constructor(ort, session, bundle) {
    this.ort = ort;
    this.session = session;
    this.bundle = bundle;
    this.#zeros = neutralFeeds(ort, bundle);
    this.#current = this.#zeros;
    const owned = new Set(Object.keys(this.#zeros));
    const unknown = [...owned].filter((name) => !session.inputNames.includes(name));
    if (unknown.length > 0) {
      throw new LoraportError(
        `${bundle.manifest.model}: expected the input ${unknown[0]} of the manifest's slots, ` +
          'got a model without it; copy the bundle again',
      );
    }
    /** The model's own inputs: all but the slots. */
    this.inputNames = session.inputNames.filter((name) => !owned.has(name));
    this.outputNames = session.outputNames;
  }

  /** The selection that `setAdapter` made. */
  get adapter() {
    return this.#selection;
  }

  /**
   * Choose what runs from now on: an adapter, a blend, or the base. The session stays open.
   *
   * The last call counts, also where an earlier one takes longer to read its files.
   * @param {Selection} selection
   * @throws {LoraportError} if it is no selection, an adapter is unknown, damaged or unfit, or a
   *   strength no number
   */
  async setAdapter(selection) {
    if (selection === undefined) throw noSelection(selection);
    const turn = ++this.#asked;
    const feeds = await this.feedsFor(selection);
    if (turn < this.#set) return;
    this.#set = turn;
    this.#current = feeds;
    this.#selection = selection;
  }

  /**
   * What the slots are fed for a selection, for use with `run`.
   * @param {Selection | undefined} selection the one that is set, if undefined
   * @returns {Promise<SlotFeeds>}
   */
  async feedsFor(selection) {
    if (selection === undefined) return this.#current;
    const wanted = strengths(selection);
    if (wanted.length === 0) return this.#zeros;
    const { manifest } = this.bundle;
    wanted.forEach(([name]) => requireAdapter(manifest, name));
    /** @type {[Map<string, PlainTensor>, number][]} */
    const parts = [];
    for (const [name, strength] of wanted) {
      parts.push([await this.bundle.readAdapter(name), strength]);
    }
    /** @type {Record<string, Tensor>} */
    const feeds = { ...this.#zeros };
    for (const [name, tensor] of blend(parts, manifest, this.bundle.baseValues)) {
      feeds[name] = toOrt(this.ort, name, tensor);
    }
    return feeds;
  }

  /**
   * Run the model once.
   * @param {Record<string, Tensor>} inputs every input but the slots
   * @param {object} [options]
   * @param {SlotFeeds} [options.slots] of `feedsFor`; those of the adapter that is set, if left out
   * @param {readonly string[]} [options.outputs] names of those wanted; all, if left out
   * @returns {Promise<Record<string, Tensor>>}
   * @throws {LoraportError} if an input is missing, unknown or refused
   */
  async run(inputs, { slots = this.#current, outputs = this.outputNames } = {}) {
    this.#checkInputs(inputs);
    const run = this.#lastRun.then(() => this.session.run({ ...slots, ...inputs }, [...outputs]));
    this.#lastRun = run.catch(() => undefined);
    try {
      return await run;
    } catch (error) {
      throw new LoraportError(`the model cannot be run: ${firstLine(error)}`, { cause: error });
    }
  }

  /** @param {Record<string, Tensor>} inputs */
  #checkInputs(inputs) {
    const problems = new Problems();
    for (const name of this.inputNames) {
      if (!(name in inputs)) problems.add(name, 'a tensor for this input', 'none');
    }
    for (const name of Object.keys(inputs)) {
      if (!this.inputNames.includes(name)) {
        problems.add(name, `one of the inputs ${this.inputNames.slice(0, 8).join(', ')}`, 'another');
      }
    }
    problems.throwIfAny("the model's inputs and those given differ");
  }

  /** Free the session. */
  async close() {
    await this.#lastRun;
    await this.session.release();
  }
}

/**
 * A plain tensor as ONNX Runtime's.
 * @param {Ort} ort
 * @param {string} name for messages
 * @param {PlainTensor} tensor
 * @returns {Tensor}
 * @throws {LoraportError} if the JavaScript API has no such element type
 */
export function toOrt(ort, name, { dtype, data, shape }) {
  const type = ELEMENT_TYPES.get(dtype)?.ort;
  if (!type) {
    throw new LoraportError(
      `${name}: expected elements that ONNX Runtime's JavaScript API takes, got ${dtype}; ` +
        'export the bundle with --precision fp32, fp16 or int4',
    );
  }
  return new ort.Tensor(/** @type {any} */ (type), /** @type {any} */ (data), shape);
}

/**
 * @param {Selection} selection
 * @returns {[string, number][]}
 */
function strengths(selection) {
  if (selection === null) return [];
  if (typeof selection === 'string') return [[selection, 1]];
  // A Map or an array has no entries of its own that name adapters: it would be the base.
  if (typeof selection !== 'object' || Symbol.iterator in selection) throw noSelection(selection);
  const entries = Object.entries(selection);
  for (const [name, strength] of entries) {
    if (typeof strength !== 'number' || !Number.isFinite(strength)) {
      throw new LoraportError(
        `strength of ${JSON.stringify(name)}: expected a finite number, got ${strength}`,
      );
    }
  }
  return entries;
}

/**
 * @param {unknown} given
 * @returns {LoraportError}
 */
function noSelection(given) {
  const got = Object.prototype.toString.call(given).slice('[object '.length, -1);
  return new LoraportError(
    'adapters: expected a name, an object of names with strengths, or null for the base, got ' +
      `${typeof given === 'object' ? got : String(given)}`,
  );
}

/**
 * What makes the graph the base.
 * @param {Ort} ort
 * @param {import('./bundle.js').Bundle} bundle
 * @returns {SlotFeeds}
 */
function neutralFeeds(ort, { manifest, baseValues }) {
  /** @type {Record<string, Tensor>} */
  const feeds = {};
  // Inputs of one size share their tensors.
  /** @type {Map<string, Tensor>} */
  const made = new Map();
  for (const slot of manifest.slots) {
    if (!SLOT_DTYPES.has(slot.dtype)) {
      throw new LoraportError(`${slot.name}: expected float elements, got ${slot.dtype}`);
    }
    for (const input of slot.inputs) {
      const key = `${slot.dtype} ${input.shape} ${input.neutral}`;
      const tensor = made.get(key) ?? toOrt(ort, input.name, neutralTensor(input, slot.dtype));
      made.set(key, tensor);
      feeds[input.name] = tensor;
    }
  }
  for (const { input } of manifest.replacements) {
    const value = baseValues.get(input);
    if (value === undefined) {
      throw new LoraportError(`${input}: expected the base's value in the bundle, got none`);
    }
    feeds[input] = toOrt(ort, input, value);
  }
  for (const { input, dtype, neutral } of manifest.controls) {
    feeds[input] =
      dtype === 'FLOAT'
        ? new ort.Tensor('float32', Float32Array.of(neutral), [1])
        : new ort.Tensor('int64', BigInt64Array.of(BigInt(neutral)), [1]);
  }
  return feeds;
}
