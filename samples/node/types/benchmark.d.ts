/**
 * @typedef {object} Figures
 * @property {number} reloadMs opening the model anew, which a swap saves
 * @property {number} swapMs setting another adapter
 * @property {number} swapPerReload
 * @property {number} blendMs setting two with strengths, NaN with one adapter
 * @property {number} blendPerReload
 * @property {number} baseTokenMs one decoding step without an adapter
 * @property {Record<string, number>} adaptedPerBase decoding step of each selection, over the base's
 * @property {number} modelBytes
 * @property {Record<string, number>} adapterBytes
 */
/**
 * Measure a bundle of a decoder language model with one adapter or more.
 * @param {string} directory
 * @returns {Promise<Figures>}
 */
export function benchmark(directory: string): Promise<Figures>;
/**
 * The figures as lines to read.
 * @param {Figures} figures
 * @returns {string}
 */
export function benchmarkTable(figures: Figures): string;
export type Figures = {
    /**
     * opening the model anew, which a swap saves
     */
    reloadMs: number;
    /**
     * setting another adapter
     */
    swapMs: number;
    swapPerReload: number;
    /**
     * setting two with strengths, NaN with one adapter
     */
    blendMs: number;
    blendPerReload: number;
    /**
     * one decoding step without an adapter
     */
    baseTokenMs: number;
    /**
     * decoding step of each selection, over the base's
     */
    adaptedPerBase: Record<string, number>;
    modelBytes: number;
    adapterBytes: Record<string, number>;
};
