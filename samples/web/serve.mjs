/**
 * A static file server with the two headers that let a page use threads.
 *
 *     node serve.mjs [DIRECTORY] [PORT]
 */

import { createReadStream } from 'node:fs';
import { stat } from 'node:fs/promises';
import { createServer } from 'node:http';
import { extname, join, resolve, sep } from 'node:path';

const [directory = import.meta.dirname, port = '8080'] = process.argv.slice(2);
const root = resolve(directory);

const TYPES = {
  '.html': 'text/html; charset=utf-8',
  '.css': 'text/css; charset=utf-8',
  '.js': 'text/javascript; charset=utf-8',
  '.mjs': 'text/javascript; charset=utf-8',
  '.json': 'application/json',
  '.wasm': 'application/wasm',
};
const HEADERS = {
  'Cross-Origin-Opener-Policy': 'same-origin',
  'Cross-Origin-Embedder-Policy': 'require-corp',
  'Cache-Control': 'no-cache',
};

const server = createServer(async (request, response) => {
  const file = fileOf(request.url ?? '/');
  const found = file && (await stat(file).catch(() => null));
  if (!found?.isFile()) {
    response.writeHead(404, HEADERS).end('not found\n');
    return;
  }
  const type = TYPES[extname(file)] ?? 'application/octet-stream';
  response.writeHead(200, { ...HEADERS, 'Content-Type': type, 'Content-Length': found.size });
  if (request.method === 'HEAD') response.end();
  else createReadStream(file).pipe(response);
});

server.listen(Number(port), '127.0.0.1', () => {
  process.stdout.write(`http://localhost:${server.address().port}/\n`);
});

/** The file an address stands for; null where it would leave the directory. */
function fileOf(address) {
  try {
    const { pathname } = new URL(address, 'http://localhost');
    const path = decodeURIComponent(pathname);
    const file = resolve(join(root, path.endsWith('/') ? `${path}index.html` : path));
    return file.startsWith(root + sep) ? file : null;
  } catch {
    return null;
  }
}
