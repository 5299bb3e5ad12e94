/** JSON as the format means it: a key that occurs twice is refused, not overwritten. */

const TOKENS = /"(?:[^"\\]|\\.)*"|[{}[\],:]/gs;

/**
 * @param {Uint8Array} bytes
 * @returns {any}
 * @throws {Error} that says what is wrong
 */
export function parseStrictJson(bytes) {
  const text = new TextDecoder('utf-8', { fatal: true }).decode(bytes);
  const value = JSON.parse(text);
  refuseRepeatedKeys(text);
  return value;
}

/** @param {string} text sound JSON */
function refuseRepeatedKeys(text) {
  /** Keys seen in each object that is open; null for a list. @type {(Set<string> | null)[]} */
  const open = [];
  let last = '';
  for (const [token] of text.matchAll(TOKENS)) {
    if (token === '{') open.push(new Set());
    else if (token === '[') open.push(null);
    else if (token === '}' || token === ']') open.pop();
    else if (token === ':') {
      const key = JSON.parse(last);
      const seen = open.at(-1);
      if (seen?.has(key)) throw new Error(`the key ${last} occurs twice`);
      seen?.add(key);
    }
    last = token;
  }
}
