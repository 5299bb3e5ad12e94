/**
 * Run every golden case.
 * @param {import('./model.js').Model} model
 * @param {import('./manifest.js').RuntimeKind} runtime whose tolerance to apply
 * @param {(report: CaseReport) => void} [onCase] told of each case as it is done
 * @returns {Promise<CaseReport[]>}
 * @throws {LoraportError} if there is no case for the base or an adapter, or one cannot be run
 */
export function checkGolden(model: import("./model.js").Model, runtime: import("./manifest.js").RuntimeKind, onCase?: (report: CaseReport) => void): Promise<CaseReport[]>;
export type PlainTensor = import("./tensor_types.js").PlainTensor;
export type Tensor = import("onnxruntime-common").Tensor;
export type CaseReport = {
    name: string;
    /**
     * name → strength; empty for the base
     */
    adapters: Record<string, number>;
    /**
     * largest difference of any element; NaN where an output has NaN
     */
    maxAbs: number;
    /**
     * Frobenius norm of the difference, relative to the expected outputs
     */
    relative: number;
    /**
     * cosine between the change from the base here and in the golden
     * outputs: 1 is the same direction, 0 none or another; NaN for the base
     */
    direction: number;
    /**
     * the effect is larger than twice the runtime's rounding, so that its
     * direction says something
     */
    telling: boolean;
    /**
     * the base changes, and where that is telling, in the right direction
     */
    swapped: boolean;
    /**
     * largest difference allowed
     */
    tolerance: number;
    passed: boolean;
};
export type ReadCase = {
    name: string;
    adapters: Record<string, number>;
    inputs: Record<string, Tensor>;
    expected: Map<string, {
        shape: number[];
        values: Float32Array;
    }>;
};
