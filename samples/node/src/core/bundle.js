/** An opened bundle: its manifest, and its files read through a store. */

import { LoraportError, Problems } from './errors.js';
import { MANIFEST_FILE, parseManifest, requireAdapter } from './manifest.js';
import { requireFit } from './packed_adapter.js';
import { parseSafetensors } from './safetensors.js';
import { requireSeal } from './seal.js';

export const BASE_VALUES_FILE = 'base_values.safetensors';

/** @typedef {import('./tensor_types.js').PlainTensor} PlainTensor */

/**
 * Where a bundle's files lie: a directory, or a web address with a cache.
 * @typedef {object} Store
 * @property {string} name for messages
 * @property {(path: string, sha256: string | null) => Promise<Uint8Array>} read returns a file's
 *   content; throws `damagedFile` or `missingFile` where it is not the one the hash says
 * @property {(path: string) => Promise<string | null>} hash returns a file's sha256, null if missing
 */

export class Bundle {
  /** @type {Map<string, Promise<Map<string, PlainTensor>>>} */
  #adapters = new Map();

  /**
   * Use `Bundle.open`.
   * @param {Store} store
   * @param {import('./manifest.js').Manifest} manifest
   */
  constructor(store, manifest) {
    this.store = store;
    this.manifest = manifest;
    /**
     * The base's own values of the parameters that adapters may replace, by graph input.
     * @type {Map<string, PlainTensor>}
     */
    this.baseValues = new Map();
  }

  /**
   * Read a bundle's manifest. Each other file is compared with its hash when it is read.
   * @param {Store} store
   * @returns {Promise<Bundle>}
   * @throws {LoraportError} if its manifest is damaged, or of another version
   */
  static async open(store) {
    const bytes = await store.read(MANIFEST_FILE, null);
    await requireSeal(bytes, MANIFEST_FILE);
    const bundle = new Bundle(store, parseManifest(bytes));
    if (bundle.manifest.replacements.length > 0) {
      bundle.baseValues = parseSafetensors(await bundle.read(BASE_VALUES_FILE), BASE_VALUES_FILE);
    }
    return bundle;
  }

  /** Names of the adapters. */
  get adapters() {
    return [...this.manifest.adapters.keys()];
  }

  /**
   * Compare every file with its hash.
   * @throws {LoraportError} naming every file that is missing or differs
   */
  async checkFiles() {
    const problems = new Problems();
    for (const [path, expected] of this.manifest.files) {
      const got = await this.store.hash(path);
      if (got === null) problems.add(path, 'the file the manifest lists', 'no such file');
      else if (got !== expected) {
        problems.add(path, ...hashes(expected, got), 'copy the bundle again');
      }
    }
    problems.throwIfAny(`bundle ${this.store.name} is not intact`);
  }

  /**
   * A file's content, compared with its hash.
   * @param {string} path
   * @returns {Promise<Uint8Array>}
   * @throws {LoraportError} if it is missing, damaged, or not in the manifest
   */
  async read(path) {
    const expected = this.manifest.files.get(path);
    if (expected === undefined) {
      throw new LoraportError(
        `${path}: expected a file that ${MANIFEST_FILE} lists with its sha256, got one it does not`,
      );
    }
    return this.store.read(path, expected);
  }

  /**
   * A file's content as JSON, or undefined where the bundle has no such file.
   * @param {string} path
   * @returns {Promise<any>}
   */
  async readJson(path) {
    const text = await this.readText(path);
    return text === undefined ? undefined : JSON.parse(text);
  }

  /**
   * A file's content as text, or undefined where the bundle has no such file.
   * @param {string} path
   * @returns {Promise<string | undefined>}
   */
  async readText(path) {
    if (!this.manifest.files.has(path)) return undefined;
    return new TextDecoder().decode(await this.read(path));
  }

  /**
   * An adapter's tensors by graph input; read once, then kept.
   * @param {string} name
   * @returns {Promise<Map<string, PlainTensor>>}
   * @throws {LoraportError} if there is none of this name, or it does not fit the slots
   */
  async readAdapter(name) {
    const { tensors: path } = requireAdapter(this.manifest, name);
    let tensors = this.#adapters.get(name);
    if (tensors === undefined) {
      tensors = this.read(path).then((bytes) => {
        const parsed = parseSafetensors(bytes, path);
        requireFit(parsed, this.manifest, path);
        return parsed;
      });
      this.#adapters.set(name, tensors);
      // A failed read is not remembered: the next one tries again.
      tensors.catch(() => this.#adapters.delete(name));
    }
    return tensors;
  }

  /**
   * Forget an adapter's tensors, to free their memory.
   * @param {string} name
   */
  unloadAdapter(name) {
    this.#adapters.delete(name);
  }
}

/**
 * @param {string} path
 * @param {string} expected sha256
 * @param {string} got sha256
 */
export function damagedFile(path, expected, got) {
  const [wanted, found] = hashes(expected, got);
  return new LoraportError(`${path}: expected ${wanted}, got ${found}; copy the bundle again`);
}

/**
 * @param {string} path
 * @param {string} bundle its name
 * @param {string} reason
 */
export function missingFile(path, bundle, reason) {
  const what = path === MANIFEST_FILE ? `a bundle with ${MANIFEST_FILE}` : `the file ${path}`;
  return new LoraportError(`bundle ${bundle}: expected ${what}, got: ${reason}`);
}

/**
 * @param {string} expected
 * @param {string} got
 * @returns {[string, string]}
 */
function hashes(expected, got) {
  return [`sha256 ${expected.slice(0, 12)}`, got.slice(0, 12)];
}
