/**
 * @param {string} path
 * @param {string} expected sha256
 * @param {string} got sha256
 */
export function damagedFile(path: string, expected: string, got: string): LoraportError;
/**
 * @param {string} path
 * @param {string} bundle its name
 * @param {string} reason
 */
export function missingFile(path: string, bundle: string, reason: string): LoraportError;
export const BASE_VALUES_FILE: "base_values.safetensors";
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
    /**
     * Read a bundle's manifest. Each other file is compared with its hash when it is read.
     * @param {Store} store
     * @returns {Promise<Bundle>}
     * @throws {LoraportError} if its manifest is damaged, or of another version
     */
    static open(store: Store): Promise<Bundle>;
    /**
     * Use `Bundle.open`.
     * @param {Store} store
     * @param {import('./manifest.js').Manifest} manifest
     */
    constructor(store: Store, manifest: import("./manifest.js").Manifest);
    store: Store;
    manifest: import("./manifest.js").Manifest;
    /**
     * The base's own values of the parameters that adapters may replace, by graph input.
     * @type {Map<string, PlainTensor>}
     */
    baseValues: Map<string, PlainTensor>;
    /** Names of the adapters. */
    get adapters(): string[];
    /**
     * Compare every file with its hash.
     * @throws {LoraportError} naming every file that is missing or differs
     */
    checkFiles(): Promise<void>;
    /**
     * A file's content, compared with its hash.
     * @param {string} path
     * @returns {Promise<Uint8Array>}
     * @throws {LoraportError} if it is missing, damaged, or not in the manifest
     */
    read(path: string): Promise<Uint8Array>;
    /**
     * A file's content as JSON, or undefined where the bundle has no such file.
     * @param {string} path
     * @returns {Promise<any>}
     */
    readJson(path: string): Promise<any>;
    /**
     * A file's content as text, or undefined where the bundle has no such file.
     * @param {string} path
     * @returns {Promise<string | undefined>}
     */
    readText(path: string): Promise<string | undefined>;
    /**
     * An adapter's tensors by graph input; read once, then kept.
     * @param {string} name
     * @returns {Promise<Map<string, PlainTensor>>}
     * @throws {LoraportError} if there is none of this name, or it does not fit the slots
     */
    readAdapter(name: string): Promise<Map<string, PlainTensor>>;
    /**
     * Forget an adapter's tensors, to free their memory.
     * @param {string} name
     */
    unloadAdapter(name: string): void;
    #private;
}
export type PlainTensor = import("./tensor_types.js").PlainTensor;
/**
 * Where a bundle's files lie: a directory, or a web address with a cache.
 */
export type Store = {
    /**
     * for messages
     */
    name: string;
    /**
     * returns a file's
     * content; throws `damagedFile` or `missingFile` where it is not the one the hash says
     */
    read: (path: string, sha256: string | null) => Promise<Uint8Array>;
    /**
     * returns a file's sha256, null if missing
     */
    hash: (path: string) => Promise<string | null>;
};
import { LoraportError } from './errors.js';
