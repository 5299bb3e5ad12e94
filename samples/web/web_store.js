/** A bundle's files behind a web address, fetched once and kept under their sha256. */

import { LoraportError, damagedFile, firstLine, missingFile } from './vendor/core/index.js';

const CACHE = 'loraport';

/**
 * @param {URL} address of the bundle, with a slash at its end
 * @param {(progress: {path: string, received: number, total: number | null}) => void} onProgress
 * @returns {import('./vendor/core/bundle.js').Store & {cached: number}}
 */
export function webStore(address, onProgress) {
  const store = {
    name: address.href,
    /** How many files came from the cache. */
    cached: 0,

    async read(path, sha256) {
      if (sha256 === null) return fetchFile(address, path, onProgress);
      const kept = await readCached(sha256);
      if (kept !== null) {
        store.cached += 1;
        return kept;
      }
      const bytes = await fetchFile(address, path, onProgress);
      const got = await digest(bytes);
      if (got !== sha256) throw damagedFile(path, sha256, got);
      await keep(sha256, bytes);
      return bytes;
    },

    async hash(path) {
      try {
        return await digest(await fetchFile(address, path, onProgress));
      } catch (error) {
        if (error instanceof LoraportError) return null;
        throw error;
      }
    },
  };
  return store;
}

/** Delete everything that was kept. */
export async function forgetAll() {
  await caches.delete(CACHE);
}

async function fetchFile(address, path, onProgress) {
  // Encoded piece by piece: a name may hold what means something in an address.
  const url = new URL(path.split('/').map(encodeURIComponent).join('/'), address);
  let response;
  try {
    response = await fetch(url);
    if (!response.ok) throw new Error(`HTTP ${response.status}`);
    return await readBody(response, (received, total) => onProgress({ path, received, total }));
  } catch (error) {
    if (error instanceof RangeError) throw error; // too big for memory: explained elsewhere
    throw missingFile(path, address.href, `${firstLine(error)} from ${url.pathname}`);
  }
}

async function readBody(response, onProgress) {
  // A compressed response tells the length of what is sent, not of what is read.
  const encoded = response.headers.has('Content-Encoding');
  const total = encoded ? null : Number(response.headers.get('Content-Length')) || null;
  const chunks = [];
  const whole = total === null ? null : room(total);
  let received = 0;
  for (const reader = response.body.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) break;
    if (whole === null) chunks.push(value);
    else if (received + value.length <= total) whole.set(value, received);
    else throw new Error(`more than the ${total} bytes announced`);
    received += value.length;
    onProgress(received, total);
  }
  if (whole === null) return new Uint8Array(await new Blob(chunks).arrayBuffer());
  return whole.subarray(0, received);
}

function room(bytes) {
  try {
    return new Uint8Array(bytes);
  } catch (error) {
    throw Object.assign(new RangeError(firstLine(error)), { bytes });
  }
}

async function digest(bytes) {
  const hash = new Uint8Array(await crypto.subtle.digest('SHA-256', bytes));
  return [...hash].map((byte) => byte.toString(16).padStart(2, '0')).join('');
}

/** The address that stands for a content in the cache; nothing is ever fetched from it. */
function keyOf(sha256) {
  return new URL(`/loraport-cache/${sha256}`, location.origin).href;
}

async function readCached(sha256) {
  const cache = await caches.open(CACHE);
  const found = await cache.match(keyOf(sha256));
  if (found === undefined) return null;
  const bytes = new Uint8Array(await found.arrayBuffer());
  if ((await digest(bytes)) === sha256) return bytes;
  await cache.delete(keyOf(sha256));
  return null;
}

async function keep(sha256, bytes) {
  try {
    const cache = await caches.open(CACHE);
    await cache.put(keyOf(sha256), new Response(bytes));
  } catch {
    // No room: the page works all the same, and fetches again next time.
  }
}
