#!/usr/bin/env node
/** `loraport-node`: data on stdout, everything else on stderr. */

import process from 'node:process';

import { USAGE, readArguments } from './arguments.js';
import { benchmark, benchmarkTable } from './benchmark.js';
import { LoraportError } from './core/index.js';
import { checkGolden, openModel, openText } from './index.js';

/** @param {string} line */
const print = (line) => process.stdout.write(`${line}\n`);

/** @param {string[]} argv */
async function main(argv) {
  const { command, bundle, json, prompt, ...options } = readArguments(argv);
  if (command === 'help') print(USAGE);
  else if (command === 'check') return check(bundle, json);
  else if (command === 'generate') await generate(bundle, prompt, options);
  else {
    const figures = await benchmark(bundle);
    print(json ? JSON.stringify(figures, null, 1) : benchmarkTable(figures));
  }
  return 0;
}

/**
 * @param {string} bundle
 * @param {boolean} json
 */
async function check(bundle, json) {
  const model = await openModel(bundle);
  const reports = await checkGolden(model, 'native', (report) => {
    if (json) return;
    const verdict = report.passed ? 'ok' : 'FAILED';
    const figures = `max |difference| ${report.maxAbs.toExponential(1)} of ${report.tolerance} allowed`;
    const swap = report.swapped ? '' : ', but the base does not change as this adapter changes it';
    print(`${verdict} ${report.name}: ${figures}${swap}`);
  });
  if (json) print(JSON.stringify(reports, null, 1));
  return reports.every((report) => report.passed) ? 0 : 1;
}

/**
 * @param {string} bundle
 * @param {string} prompt
 * @param {import('./index.js').GenerateOptions & {chat: boolean}} options
 */
async function generate(bundle, prompt, options) {
  const text = await openText(await openModel(bundle));
  const started = performance.now();
  let pieces = 0;
  for await (const piece of text.stream(prompt, options)) {
    process.stdout.write(piece);
    pieces += 1;
  }
  const seconds = (performance.now() - started) / 1000;
  process.stdout.write('\n');
  process.stderr.write(`${pieces} pieces of text, ${(pieces / seconds).toFixed(1)} a second\n`);
}

try {
  process.exitCode = await main(process.argv.slice(2));
} catch (error) {
  if (!(error instanceof LoraportError)) throw error;
  process.stderr.write(`error: ${error.message}\n`);
  process.exitCode = 2;
}
