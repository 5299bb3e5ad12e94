/** `manifest.json`: what is in a bundle. */

import { LoraportError, Problems, firstLine } from './errors.js';
import { parseStrictJson } from './strict_json.js';

export const MANIFEST_FILE = 'manifest.json';
export const SCHEMA_VERSION = 1;

/**
 * Which kind of ONNX Runtime computes: native on the CPU, or the browser's two.
 * @typedef {'native' | 'wasm' | 'webgpu'} RuntimeKind
 */

/**
 * A place in the graph where a low-rank update is added: `y += (x A) B`.
 * @typedef {object} Slot
 * @property {string} name
 * @property {string} inputA graph input that takes A `[in, r]`
 * @property {string} inputB graph input that takes B `[r, out]`, scaling folded in
 * @property {number} inFeatures
 * @property {number} outFeatures
 * @property {string} dtype ONNX's name for the element type of both
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
 * @property {Map<string, BundledAdapter>} adapters
 * @property {Map<string, GoldenCase>} golden
 * @property {number} tolerance largest difference from a golden value
 * @property {Map<string, number>} tolerances runtime → its own tolerance, where that differs
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
 */
export function toleranceFor(manifest, runtime) {
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
  return {
    name: text(entry?.name, `${where}.name`),
    inputA: text(entry.inputs?.lora_A, `${where}.inputs.lora_A`),
    inputB: text(entry.inputs?.lora_B, `${where}.inputs.lora_B`),
    inFeatures: size(entry.in_features, `${where}.in_features`),
    outFeatures: size(entry.out_features, `${where}.out_features`),
    dtype: text(entry.dtype, `${where}.dtype`),
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
