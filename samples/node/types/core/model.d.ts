/**
 * A plain tensor as ONNX Runtime's.
 * @param {Ort} ort
 * @param {string} name for messages
 * @param {PlainTensor} tensor
 * @returns {Tensor}
 * @throws {LoraportError} if the JavaScript API has no such element type
 */
export function toOrt(ort: Ort, name: string, { dtype, data, shape }: PlainTensor): Tensor;
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
    /**
     * @param {Ort} ort
     * @param {Session} session over the bundle's `model_required` graph
     * @param {import('./bundle.js').Bundle} bundle
     */
    constructor(ort: Ort, session: Session, bundle: import("./bundle.js").Bundle);
    ort: Ort;
    session: import("onnxruntime-common").InferenceSession;
    bundle: import("./bundle.js").Bundle;
    /** The model's own inputs: all but the slots. */
    inputNames: string[];
    outputNames: readonly string[];
    /** The selection that `setAdapter` made. */
    get adapter(): Selection;
    /**
     * Choose what runs from now on: an adapter, a blend, or the base. The session stays open.
     *
     * The last call counts, also where an earlier one takes longer to read its files.
     * @param {Selection} selection
     * @throws {LoraportError} if it is no selection, an adapter is unknown, damaged or unfit, or a
     *   strength no number
     */
    setAdapter(selection: Selection): Promise<void>;
    /**
     * What the slots are fed for a selection, for use with `run`.
     * @param {Selection | undefined} selection the one that is set, if undefined
     * @returns {Promise<SlotFeeds>}
     */
    feedsFor(selection: Selection | undefined): Promise<SlotFeeds>;
    /**
     * Run the model once.
     * @param {Record<string, Tensor>} inputs every input but the slots
     * @param {object} [options]
     * @param {SlotFeeds} [options.slots] of `feedsFor`; those of the adapter that is set, if left out
     * @param {readonly string[]} [options.outputs] names of those wanted; all, if left out
     * @returns {Promise<Record<string, Tensor>>}
     * @throws {LoraportError} if an input is missing, unknown or refused
     */
    run(inputs: Record<string, Tensor>, { slots, outputs }?: {
        slots?: Readonly<Record<string, import("onnxruntime-common").Tensor>> | undefined;
        outputs?: readonly string[] | undefined;
    }): Promise<Record<string, Tensor>>;
    /** Free the session. */
    close(): Promise<void>;
    #private;
}
export type Session = import("onnxruntime-common").InferenceSession;
export type Tensor = import("onnxruntime-common").Tensor;
export type PlainTensor = import("./tensor_types.js").PlainTensor;
/**
 * The part of ONNX Runtime's API that is needed; `onnxruntime-node` and `-web` both have it.
 */
export type Ort = {
    Tensor: typeof import("onnxruntime-common").Tensor;
};
/**
 * An adapter's name, several with a strength each, or null for the base.
 */
export type Selection = string | Record<string, number> | null;
/**
 * What the slots are fed for a selection; kept and used again by whoever asked for it.
 */
export type SlotFeeds = Readonly<Record<string, Tensor>>;
