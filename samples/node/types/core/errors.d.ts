/**
 * The first line of whatever was thrown, for use inside a message of our own.
 * @param {unknown} error
 * @returns {string}
 */
export function firstLine(error: unknown): string;
/** Errors a user can act on, each naming the thing, what was expected, what was got, what to do. */
/** Bad input: a file, an option or a model that cannot be used. Anything else is a bug. */
export class LoraportError extends Error {
}
/** Collects everything that is wrong with one input, so that it is reported together. */
export class Problems {
    /**
     * Record one problem and carry on.
     * @param {string} subject the tensor, key or file concerned
     * @param {string} expected what would have been right
     * @param {string} got what was found
     * @param {string} [remedy] what the user can do about it
     */
    add(subject: string, expected: string, got: string, remedy?: string): void;
    /**
     * Throw all recorded problems as one error, one line each.
     * @param {string} headline what was being read
     * @throws {LoraportError} if anything was recorded
     */
    throwIfAny(headline: string): void;
    #private;
}
