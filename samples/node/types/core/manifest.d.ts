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
export function parseManifest(bytes: Uint8Array): Manifest;
/**
 * How far a runtime's output may be from a golden value.
 * @param {Manifest} manifest
 * @param {RuntimeKind} runtime
 * @returns {number}
 * @throws {LoraportError} if there is no such runtime
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
 * A graph input that adapters fill.
 */
export type SlotInput = {
    role: "lora_A" | "lora_B" | "gain" | "bias";
    name: string;
    /**
     * null where the rank is
     */
    shape: (number | null)[];
    /**
     * what fills it where there is no adapter
     */
    neutral: number;
};
/**
 * A place in the graph where an update is added: `y' = gain y + (x A) B + bias`.
 */
export type Slot = {
    name: string;
    inputs: SlotInput[];
    /**
     * the paths of those that it serves
     */
    modules: string[];
    /**
     * ONNX's name for the element type of all
     */
    dtype: string;
};
/**
 * A graph input that takes a whole parameter; the base's own is in `base_values.safetensors`.
 */
export type ReplacementSlot = {
    parameter: string;
    input: string;
    shape: number[];
    dtype: string;
};
/**
 * A graph input `[1]` that says how adapters are used.
 */
export type Control = {
    input: string;
    dtype: "FLOAT" | "INT64";
    neutral: number;
};
/**
 * All inputs that are no inputs of the base.
 */
export type SlotTable = {
    slots: Slot[];
    replacements: ReplacementSlot[];
    controls: Control[];
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
    replacements: ReplacementSlot[];
    controls: Control[];
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
     * tokens that a text may have before other factors
     * rotate all of it, so that cached keys no longer hold; null where there is one set of factors
     */
    longRotationsAfter: number | null;
    /**
     * path → sha256
     */
    files: Map<string, string>;
};
