/** A bundle's files in a directory. */

import { createHash } from 'node:crypto';
import { createReadStream } from 'node:fs';
import { readFile } from 'node:fs/promises';
import { join } from 'node:path';
import { pipeline } from 'node:stream/promises';

import { damagedFile, firstLine, missingFile } from './core/index.js';

/**
 * @param {string} directory
 * @returns {import('./core/bundle.js').Store}
 */
export function directoryStore(directory) {
  return {
    name: directory,
    async read(path, sha256) {
      let bytes;
      try {
        bytes = await readFile(join(directory, path));
      } catch (error) {
        throw missingFile(path, directory, firstLine(error));
      }
      if (sha256 !== null) {
        const got = createHash('sha256').update(bytes).digest('hex');
        if (got !== sha256) throw damagedFile(path, sha256, got);
      }
      return bytes;
    },
    async hash(path) {
      const hash = createHash('sha256');
      try {
        await pipeline(createReadStream(join(directory, path)), hash);
      } catch {
        return null;
      }
      return hash.digest('hex');
    },
  };
}
