/** The page in Chromium, on a static server of its own. */

import { spawn } from 'node:child_process';
import { once } from 'node:events';
import { cpSync, mkdtempSync, rmSync, symlinkSync } from 'node:fs';
import { tmpdir } from 'node:os';
import { join } from 'node:path';

import { chromium } from 'playwright-core';

const root = new URL('../', import.meta.url).pathname;
const PAGE = /\.(html|css|js|mjs)$/;

/** Serve the page with a bundle beside it; returns its address and how to stop. */
export async function serve(bundle) {
  const site = mkdtempSync(join(tmpdir(), 'site-'));
  cpSync(root, site, { recursive: true, filter: (from) => from === root || PAGE.test(from) && !from.includes('node_modules') });
  symlinkSync(join(root, 'vendor'), join(site, 'vendor'));
  symlinkSync(bundle, join(site, 'bundle'));
  const server = spawn(process.execPath, [join(root, 'serve.mjs'), site, '0']);
  const [line] = await once(server.stdout, 'data');
  return {
    address: String(line).trim(),
    stop() {
      server.kill();
      rmSync(site, { recursive: true });
    },
  };
}

export function launch() {
  return chromium.launch({ executablePath: process.env.CHROMIUM, args: ['--no-sandbox'] });
}

/** A page that counts what it fetches of the bundle and keeps what it complains of. */
export async function visit(context, address, { runtime = 'wasm' } = {}) {
  const page = await context.newPage();
  page.setDefaultTimeout(300_000); // a real model takes long to open and check on a busy machine
  const fetched = [];
  const complaints = [];
  page.on('request', (request) => {
    const [, path] = request.url().split('/bundle/');
    if (path) fetched.push(path);
  });
  page.on('pageerror', (error) => complaints.push(error.message));
  page.on('console', (message) => {
    if (message.type() === 'error') complaints.push(message.text());
  });
  await page.goto(`${address}?runtime=${runtime}`);
  await page.waitForFunction(
    () => document.body.dataset.ready || !document.getElementById('error').hidden,
  );
  return { page, fetched, complaints };
}

/** Generate and return both texts. */
export async function generate(page) {
  await page.getByRole('button', { name: 'Generate' }).click();
  await page.waitForFunction(() => document.getElementById('status').textContent === 'Done.');
  return { base: await page.textContent('#base-text'), adapted: await page.textContent('#adapted-text') };
}

/** Wait until the page has set just this selection. */
export async function hasSet(page, selection) {
  await page.waitForFunction(
    (wanted) => document.getElementById('swap').dataset.selection === wanted,
    JSON.stringify(selection),
  );
}

/** Run the golden check and return the table's rows. */
export async function check(page) {
  await page.getByRole('button', { name: 'Check this bundle' }).click();
  await page.waitForFunction(
    () => /cases/.test(document.getElementById('check-status').textContent) || !document.getElementById('error').hidden,
  );
  return page.$$eval('#check-table tbody tr', (rows) =>
    rows.map((row) => [...row.cells].map((cell) => cell.textContent)));
}

/** Where SCREENSHOTS names a folder, keep how the page looks. */
export async function shoot(page, name) {
  const folder = process.env.SCREENSHOTS;
  if (folder) await page.screenshot({ path: join(folder, `${name}.png`), fullPage: true });
}
