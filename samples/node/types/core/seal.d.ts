/**
 * Check that a manifest is as it was written: it ends with the sha256 of every byte before the
 * digits of that.
 * @param {Uint8Array} bytes
 * @param {string} name of the file, for messages
 * @returns {Promise<void>}
 * @throws {LoraportError} if it has no sha256, or another content's
 */
export function requireSeal(bytes: Uint8Array, name: string): Promise<void>;
