/**
 * @param {Uint8Array} bytes
 * @returns {any}
 * @throws {Error} that says what is wrong
 */
export function parseStrictJson(bytes: Uint8Array): any;
