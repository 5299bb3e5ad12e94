/** What adapters cost, as ratios measured in one run on one machine. */

import { stat } from 'node:fs/promises';
import { join } from 'node:path';

import { generate, openModel } from './index.js';

const REPEATS = 5;
const ROUNDS = 3;
const TOKENS = 16;
const PROMPT = [1, 2, 3, 4, 5, 6, 7, 8];

/**
 * @typedef {object} Figures
 * @property {number} reloadMs opening the model anew, which a swap saves
 * @property {number} swapMs setting another adapter
 * @property {number} swapPerReload
 * @property {number} blendMs setting two with strengths, NaN with one adapter
 * @property {number} blendPerReload
 * @property {number} baseTokenMs one decoding step without an adapter
 * @property {Record<string, number>} adaptedPerBase decoding step of each selection, over the base's
 * @property {number} modelBytes
 * @property {Record<string, number>} adapterBytes
 */

/**
 * Measure a bundle of a decoder language model with one adapter or more.
 * @param {string} directory
 * @returns {Promise<Figures>}
 */
export async function benchmark(directory) {
  const model = await openModel(directory);
  const { adapters, manifest } = model.bundle;
  const [first, second] = adapters;
  const both = first && second ? { [first]: 0.5, [second]: 0.5 } : null;
  /** @type {[string, import('./index.js').Selection][]} */
  const selections = adapters.slice(0, 2).map((name) => [name, name]);
  if (both) selections.push([`${first} + ${second}`, both]);
  // Read from disk once, as in use; what is timed is the swap.
  for (const [, selection] of selections) await model.setAdapter(selection);

  let turn = 0;
  const swapMs = await median(() => model.setAdapter(adapters[turn++ % adapters.length] ?? null));
  const blendMs = both ? await median(() => model.setAdapter(both)) : NaN;
  const reloadMs = await median(async () => (await openModel(directory, { check: false })).close());
  const [baseTokenMs = NaN, ...adapted] = await tokenTimes(model, [
    null,
    ...selections.map(([, selection]) => selection),
  ]);
  const entries = selections.map(([label], index) => [label, Number(adapted[index]) / baseTokenMs]);
  const adapterBytes = [...manifest.adapters].map(async ([name, { tensors }]) => [
    name,
    (await stat(join(directory, tensors))).size,
  ]);
  const data = `${manifest.model.replace('.required', '')}.data`;
  await model.close();
  return {
    reloadMs,
    swapMs,
    swapPerReload: swapMs / reloadMs,
    blendMs,
    blendPerReload: blendMs / reloadMs,
    baseTokenMs,
    adaptedPerBase: Object.fromEntries(entries),
    modelBytes: (await stat(join(directory, data)).catch(() => ({ size: NaN }))).size,
    adapterBytes: Object.fromEntries(await Promise.all(adapterBytes)),
  };
}

/**
 * The figures as lines to read.
 * @param {Figures} figures
 * @returns {string}
 */
export function benchmarkTable(figures) {
  const megabytes = (/** @type {number} */ bytes) => `${(bytes / 1e6).toFixed(1)} MB`;
  const cost = (/** @type {number} */ ms, /** @type {number} */ perReload) =>
    `${ms.toFixed(2)} ms, 1/${Math.round(1 / perReload)} of opening the model again`;
  const lines = [`swap an adapter           ${cost(figures.swapMs, figures.swapPerReload)}`];
  if (!Number.isNaN(figures.blendMs)) {
    lines.push(`blend two                 ${cost(figures.blendMs, figures.blendPerReload)}`);
  }
  lines.push(`decode a token, base      ${figures.baseTokenMs.toFixed(1)} ms`);
  for (const [label, ratio] of Object.entries(figures.adaptedPerBase)) {
    const told = Number.isNaN(ratio) ? 'nothing to measure: the text ends at once' : `${ratio.toFixed(2)} × base`;
    lines.push(`decode a token, ${label.padEnd(9)} ${told}`);
  }
  lines.push(`model on disk             ${megabytes(figures.modelBytes)}`);
  for (const [name, bytes] of Object.entries(figures.adapterBytes)) {
    lines.push(`adapter ${name.padEnd(17)} ${megabytes(bytes)}`);
  }
  return lines.join('\n');
}

/**
 * Median time of a decoding step for each selection, measured in turns so that all share what
 * else the machine does.
 * @param {import('./index.js').Model} model
 * @param {import('./index.js').Selection[]} selections
 */
async function tokenTimes(model, selections) {
  const times = selections.map(() => /** @type {number[]} */ ([]));
  // The first round warms up and does not count.
  for (let round = 0; round <= ROUNDS; round++) {
    for (const [index, adapter] of selections.entries()) {
      let last = NaN;
      for await (const token of generate(model, PROMPT, { adapter, maxNewTokens: TOKENS })) {
        const now = performance.now();
        // The first token's time is the prompt's.
        if (round > 0 && token >= 0 && !Number.isNaN(last)) times[index]?.push(now - last);
        last = now;
      }
    }
  }
  return times.map(middle);
}

/**
 * @param {() => Promise<unknown>} action
 * @returns {Promise<number>} milliseconds
 */
async function median(action) {
  const times = [];
  for (let repeat = 0; repeat < REPEATS; repeat++) {
    const started = performance.now();
    await action();
    times.push(performance.now() - started);
  }
  return middle(times);
}

/** @param {number[]} values */
function middle(values) {
  return values.sort((a, b) => a - b)[Math.floor(values.length / 2)] ?? NaN;
}
