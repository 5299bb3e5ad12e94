/** `manifest.json`: what is in a bundle. */

import { LoraportError, Problems, firstLine } from './errors.js';
import { parseStrictJson } from './strict_json.js';

export const MANIFEST_FILE = 'manifest.json';
export const SCHEMA_VERSION = 1;
const RUNTIMES = ['native', 'wasm', 'webgpu'];

/**
 * Which kind of ONNX Runtime computes: native on the CPU, or the browser's two.
 * @typedef {'native' | 'wasm' | 'webgpu'} RuntimeKind
 */

/**
 * A graph input that adapters fill.
 * @typedef {object} SlotInput
 * @property {'lora_A' | 'lora_B' | 'gain' | 'bias'} role
 * @property {string} name
 * @property {(number | null)[]} shape null where the rank is
 * @property {number} neutral what fills it where there is no adapter
 */

/**
 * A place in the graph where an update is added: `y' = gain y + (x A) B + bias`.
 * @typedef {object} Slot
 * @property {string} name
 * @property {SlotInput[]} inputs
 * @property {string[]} modules the paths of those that it serves
 * @property {string} dtype ONNX's name for the element type of all
 */

/**
 * A graph input that takes a whole parameter; the base's own is in `base_values.safetensors`.
 * @typedef {object} ReplacementSlot
 * @property {string} parameter
 * @property {string} input
 * @property {number[]} shape
 * @property {string} dtype
 */

/**
 * A graph input `[1]` that says how adapters are used.
 * @typedef {object} Control
 * @property {string} input
 * @property {'FLOAT' | 'INT64'} dtype
 * @property {number} neutral
 */

/**
 * All inputs that are no inputs of the base.
 * @typedef {object} SlotTable
 * @property {Slot[]} slots
 * @property {ReplacementSlot[]} replacements
 * @property {Control[]} controls
 */

/**
 * @typedef {object} BundledAdapter
 * @property {string} tensors its `.safetensors` file
 * @property {Map<string, number>} ranks slot name → rank
 */

/**
 * Inputs and the outputs they must give.
 * @typedef {object} GoldenCase
 * @property {Record<string, number>} adapters adapter name → strength; empty for the base
 * @property {string} file `.safetensors` with `input.NAME` and `output.NAME`
 */

/**
 * @typedef {object} Manifest
 * @property {string} baseName
 * @property {string} precision
 * @property {string} model the graph whose slots are plain required inputs
 * @property {Slot[]} slots
 * @property {ReplacementSlot[]} replacements
 * @property {Control[]} controls
 * @property {Map<string, BundledAdapter>} adapters
 * @property {Map<string, GoldenCase>} golden
 * @property {number} tolerance largest difference from a golden value
 * @property {Map<string, number>} tolerances runtime → its own tolerance, where that differs
 * @property {number | null} longRotationsAfter tokens that a text may have before other factors
 *   rotate all of it, so that cached keys no longer hold; null where there is one set of factors
 * @property {Map<string, string>} files path → sha256
 */

/**
 * Read a manifest.
 * @param {Uint8Array} bytes
 * @returns {Manifest}
 * @throws {LoraportError} if it is none, of another version, or names a file outside the bundle
 */
export function parseManifest(bytes) {
  /** @type {any} */
  let document;
  try {
    document = parseStrictJson(bytes);
  } catch (error) {
    throw new LoraportError(
      `${MANIFEST_FILE}: expected sound JSON, got: ${firstLine(error)}; copy the bundle again`,
    );
  }
  const version = document?.schema_version;
  if (version !== SCHEMA_VERSION) {
    throw new LoraportError(
      `${MANIFEST_FILE}: expected schema version ${SCHEMA_VERSION}, got ` +
        `${JSON.stringify(version)}; use the runner of the loraport that wrote the bundle`,
    );
  }
  const manifest = readDocument(document);
  refuseOutsidePaths(manifest);
  return manifest;
}

/**
 * How far a runtime's output may be from a golden value.
 * @param {Manifest} manifest
 * @param {RuntimeKind} runtime
 * @returns {number}
 * @throws {LoraportError} if there is no such runtime
 */
export function toleranceFor(manifest, runtime) {
  if (!RUNTIMES.includes(runtime)) {
    throw new LoraportError(`runtime: expected ${RUNTIMES.join(', ')}, got ${String(runtime)}`);
  }
  return manifest.tolerances.get(runtime) ?? manifest.tolerance;
}

/**
 * An adapter's entry.
 * @param {Manifest} manifest
 * @param {string} name
 * @returns {BundledAdapter}
 * @throws {LoraportError} if the bundle has none of this name
 */
export function requireAdapter(manifest, name) {
  const found = manifest.adapters.get(name);
  if (found !== undefined) return found;
  const known = [...manifest.adapters.keys()].join(', ') || 'none';
  throw new LoraportError(
    `adapter ${JSON.stringify(name)}: expected one of the bundle's (${known}); ` +
      'add it with loraport add',
  );
}

/**
 * @param {any} document
 * @returns {Manifest}
 */
function readDocument(document) {
  return {
    baseName: text(object(document.base, 'base').name, 'base.name'),
    precision: text(document.precision, 'precision'),
    model: text(document.model_required, 'model_required'),
    slots: list(document.slots, 'slots').map(readSlot),
    replacements: list(document.replacements ?? [], 'replacements').map(readReplacement),
    controls: list(document.controls ?? [], 'controls').map(readControl),
    adapters: mapped(document.adapters, 'adapters', (entry, where) => ({
      tensors: text(entry?.tensors, `${where}.tensors`),
      ranks: mapped(entry?.ranks, `${where}.ranks`, size),
    })),
    golden: mapped(document.golden, 'golden', (entry, where) => ({
      adapters: Object.fromEntries(mapped(entry?.adapters, `${where}.adapters`, number)),
      file: text(entry?.file, `${where}.file`),
    })),
    tolerance: bound(document.tolerance, 'tolerance'),
    tolerances: mapped(document.tolerances ?? {}, 'tolerances', bound),
    longRotationsAfter:
      document.long_rotations_after === undefined
        ? null
        : size(document.long_rotations_after, 'long_rotations_after'),
    files: mapped(document.files, 'files', text),
  };
}

/**
 * @param {any} entry
 * @param {number} index
 * @returns {Slot}
 */
function readSlot(entry, index) {
  const where = `slots[${index}]`;
  const name = text(entry?.name, `${where}.name`);
  const [input, out] = [
    size(entry.in_features, `${where}.in_features`),
    size(entry.out_features, `${where}.out_features`),
  ];
  const kernel = list(entry.kernel ?? [], `${where}.kernel`).map((value) => size(value, where));
  const conv = entry.kind === 'conv';
  /** @type {Record<SlotInput['role'], [(number | null)[], number]>} */
  const shapes = {
    lora_A: [conv ? [null, input, ...kernel] : [input, null], 0],
    lora_B: [conv ? [out, null, ...kernel.map(() => 1)] : [null, out], 0],
    gain: [[out], 1],
    bias: [[out], 0],
  };
  const inputs = mapped(entry.inputs, `${where}.inputs`, text);
  for (const role of ['lora_A', 'lora_B']) text(inputs.get(role), `${where}.inputs.${role}`);
  return {
    name,
    inputs: [...inputs].map(([key, input]) => {
      const role = /** @type {SlotInput['role']} */ (key);
      const [shape, neutral] = shapes[role] ?? refuse('a role of an input', where, key);
      return { role, name: input, shape, neutral };
    }),
    modules: list(entry.modules ?? [], `${where}.modules`).map((module) =>
      text(module?.path, `${where}.modules`),
    ),
    dtype: text(entry.dtype, `${where}.dtype`),
  };
}

/**
 * @param {any} entry
 * @param {number} index
 * @returns {ReplacementSlot}
 */
function readReplacement(entry, index) {
  const where = `replacements[${index}]`;
  return {
    parameter: text(entry?.parameter, `${where}.parameter`),
    input: text(entry.input, `${where}.input`),
    shape: list(entry.shape, `${where}.shape`).map((value) => size(value, `${where}.shape`)),
    dtype: text(entry.dtype, `${where}.dtype`),
  };
}

/**
 * @param {any} entry
 * @param {number} index
 * @returns {Control}
 */
function readControl(entry, index) {
  const where = `controls[${index}]`;
  const dtype = text(entry?.dtype, `${where}.dtype`);
  if (dtype !== 'FLOAT' && dtype !== 'INT64') refuse('FLOAT or INT64', `${where}.dtype`, dtype);
  return {
    input: text(entry.input, `${where}.input`),
    dtype,
    neutral: number(entry.neutral, `${where}.neutral`),
  };
}

/** @param {Manifest} manifest */
function refuseOutsidePaths(manifest) {
  const problems = new Problems();
  const paths = new Set([
    manifest.model,
    ...manifest.files.keys(),
    ...[...manifest.golden.values()].map((entry) => entry.file),
    ...[...manifest.adapters.values()].map((entry) => entry.tensors),
  ]);
  for (const path of paths) {
    const outside = path === '' || path.startsWith('/') || path.split('/').includes('..');
    if (outside || /[\\:\0]/.test(path)) {
      problems.add(JSON.stringify(path), 'a path inside the bundle', 'one that leaves it');
    }
  }
  problems.throwIfAny(`${MANIFEST_FILE} names files outside the bundle`);
}

/**
 * @param {string} what
 * @param {string} where
 * @param {unknown} got
 * @returns {never}
 */
function refuse(what, where, got) {
  const shown = JSON.stringify(got)?.slice(0, 60) ?? 'nothing';
  throw new LoraportError(
    `${MANIFEST_FILE}: expected ${what} at ${where}, got ${shown}; copy the bundle again`,
  );
}

/** @type {(value: unknown, where: string) => string} */
const text = (value, where) => (typeof value === 'string' ? value : refuse('a text', where, value));

/** @type {(value: unknown, where: string) => number} */
const number = (value, where) =>
  typeof value === 'number' && Number.isFinite(value) ? value : refuse('a number', where, value);

/** @type {(value: unknown, where: string) => number} */
const bound = (value, where) =>
  number(value, where) >= 0 ? Number(value) : refuse('0 or more', where, value);

/** @type {(value: unknown, where: string) => number} */
const size = (value, where) =>
  Number.isSafeInteger(value) && Number(value) > 0
    ? Number(value)
    : refuse('a whole number above 0', where, value);

/** @type {(value: unknown, where: string) => any[]} */
const list = (value, where) => (Array.isArray(value) ? value : refuse('a list', where, value));

/** @type {(value: any, where: string) => any} */
const object = (value, where) =>
  typeof value === 'object' && value !== null && !Array.isArray(value)
    ? value
    : refuse('an object', where, value);

/**
 * @template T
 * @param {unknown} value
 * @param {string} where
 * @param {(entry: any, where: string) => T} read
 * @returns {Map<string, T>}
 */
function mapped(value, where, read) {
  const entries = Object.entries(object(value, where));
  return new Map(entries.map(([key, entry]) => [key, read(entry, `${where}[${key}]`)]));
}
