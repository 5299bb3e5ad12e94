/**
 * Run every golden case.
 * @param {import('./model.js').Model} model
 * @param {import('./manifest.js').RuntimeKind} runtime whose tolerance to apply
 * @param {(report: CaseReport) => void} [onCase] told of each case as it is done
 * @returns {Promise<CaseReport[]>}
 * @throws {LoraportError} if there is no case for the base or an adapter, or one cannot be run
 */
export function checkGolden(model: import("./model.js").Model, runtime: import("./manifest.js").RuntimeKind, onCase?: (report: CaseReport) => void): Promise<CaseReport[]>;
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
     * largest difference allowed
     */
    tolerance: number;
    passed: boolean;
};
