/** The manifest's own sha256, at its end. */

import { LoraportError } from './errors.js';

const MEMBER = '"manifest_sha256": "';
const END = '"\n}\n';
const DIGITS = 64;
const REMEDY = 'it is damaged or was edited: copy the bundle again';

/**
 * Check that a manifest is as it was written: it ends with the sha256 of every byte before the
 * digits of that.
 * @param {Uint8Array} bytes
 * @param {string} name of the file, for messages
 * @returns {Promise<void>}
 * @throws {LoraportError} if it has no sha256, or another content's
 */
export async function requireSeal(bytes, name) {
  const text = (/** @type {number} */ start, /** @type {number} */ end) =>
    String.fromCharCode(...bytes.subarray(Math.max(0, start), Math.max(0, end)));
  const digits = bytes.length - END.length - DIGITS;
  const sealed =
    text(digits - MEMBER.length, digits) === MEMBER && text(digits + DIGITS, bytes.length) === END;
  if (!sealed) {
    throw new LoraportError(`${name}: expected its own sha256 at its end, got none; ${REMEDY}`);
  }
  const expected = text(digits, digits + DIGITS);
  const hash = await crypto.subtle.digest('SHA-256', bytes.slice(0, digits));
  const got = [...new Uint8Array(hash)].map((byte) => byte.toString(16).padStart(2, '0')).join('');
  if (got !== expected) {
    throw new LoraportError(
      `${name}: expected sha256 ${expected.slice(0, 12)}, got ${got.slice(0, 12)}; ${REMEDY}`,
    );
  }
}
