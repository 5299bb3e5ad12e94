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
export function parseManifest(bytes: Uint8Array): Manifest;
/**
 * How far a runtime's output may be from a golden value.
 * @param {Manifest} manifest
 * @param {RuntimeKind} runtime
 * @returns {number}
 */
export function toleranceFor(manifest: Manifest, runtime: RuntimeKind): number;
/**
 * An adapter's entry.
 * @param {Manifest} manifest
 * @param {string} name
 * @returns {BundledAdapter}
 * @throws {LoraportError} if the bundle has none of this name
 */
export function requireAdapter(manifest: Manifest, name: string): BundledAdapter;
export const MANIFEST_FILE: "manifest.json";
export const SCHEMA_VERSION: 1;
/**
 * Which kind of ONNX Runtime computes: native on the CPU, or the browser's two.
 */
export type RuntimeKind = "native" | "wasm" | "webgpu";
/**
 * A place in the graph where a low-rank update is added: `y += (x A) B`.
 */
export type Slot = {
    name: string;
    /**
     * graph input that takes A `[in, r]`
     */
    inputA: string;
    /**
     * graph input that takes B `[r, out]`, scaling folded in
     */
    inputB: string;
    inFeatures: number;
    outFeatures: number;
    /**
     * ONNX's name for the element type of both
     */
    dtype: string;
};
export type BundledAdapter = {
    /**
     * its `.safetensors` file
     */
    tensors: string;
    /**
     * slot name → rank
     */
    ranks: Map<string, number>;
};
/**
 * Inputs and the outputs they must give.
 */
export type GoldenCase = {
    /**
     * adapter name → strength; empty for the base
     */
    adapters: Record<string, number>;
    /**
     * `.safetensors` with `input.NAME` and `output.NAME`
     */
    file: string;
};
export type Manifest = {
    baseName: string;
    precision: string;
    /**
     * the graph whose slots are plain required inputs
     */
    model: string;
    slots: Slot[];
    adapters: Map<string, BundledAdapter>;
    golden: Map<string, GoldenCase>;
    /**
     * largest difference from a golden value
     */
    tolerance: number;
    /**
     * runtime → its own tolerance, where that differs
     */
    tolerances: Map<string, number>;
    /**
     * path → sha256
     */
    files: Map<string, string>;
};
