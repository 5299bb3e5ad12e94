/**
 * Replay a bundle's golden cases: does this runtime compute what the manifest says?
 *
 * Two things are asked of each case. No element may differ by more than the tolerance. And an
 * adapter must change this runtime's base outputs, in the direction in which it changes the golden
 * ones and more so than in another adapter's: where kernels round so much that the tolerance is as
 * wide as an adapter's effect, this is what proves the swap. An adapter whose whole effect is less
 * than twice what the runtime's rounding does to the base has no direction that could be told; of
 * it, only a change is asked.
 */

import { LoraportError } from './errors.js';
import { toleranceFor } from './manifest.js';
import { toOrt } from './model.js';
import { parseSafetensors } from './safetensors.js';
import { asFloat32, isFiniteTensor } from './tensor_types.js';

/**
 * @typedef {import('./tensor_types.js').PlainTensor} PlainTensor
 * @typedef {import('onnxruntime-common').Tensor} Tensor
 */

/**
 * @typedef {object} CaseReport
 * @property {string} name
 * @property {Record<string, number>} adapters name → strength; empty for the base
 * @property {number} maxAbs largest difference of any element; NaN where an output has NaN
 * @property {number} relative Frobenius norm of the difference, relative to the expected outputs
 * @property {number} direction cosine between the change from the base here and in the golden
 *   outputs: 1 is the same direction, 0 none or another; NaN for the base
 * @property {boolean} telling the effect is larger than twice the runtime's rounding, so that its
 *   direction says something
 * @property {boolean} swapped the base changes, and where that is telling, in the right direction
 * @property {number} tolerance largest difference allowed
 * @property {boolean} passed
 */

/**
 * @typedef {object} ReadCase
 * @property {string} name
 * @property {Record<string, number>} adapters
 * @property {Record<string, Tensor>} inputs
 * @property {Map<string, {shape: number[], values: Float32Array}>} expected
 */

const INPUT = 'input.';
const OUTPUT = 'output.';

/**
 * Run every golden case.
 * @param {import('./model.js').Model} model
 * @param {import('./manifest.js').RuntimeKind} runtime whose tolerance to apply
 * @param {(report: CaseReport) => void} [onCase] told of each case as it is done
 * @returns {Promise<CaseReport[]>}
 * @throws {LoraportError} if there is no case for the base or an adapter, or one cannot be run
 */
export async function checkGolden(model, runtime, onCase = () => undefined) {
  const { manifest } = model.bundle;
  requireCases(manifest);
  const tolerance = toleranceFor(manifest, runtime);
  /** @type {ReadCase[]} */
  const cases = [];
  for (const name of manifest.golden.keys()) cases.push(await readCase(model, name));
  const base = /** @type {ReadCase} */ (cases.find(isBase));
  const ownBase = readOutputs(await runCase(model, base), base);
  const reports = [];
  for (const entry of cases) {
    const outputs = isBase(entry) ? ownBase : readOutputs(await runCase(model, entry), entry);
    const difference = compare(entry.expected, outputs);
    const change = isBase(entry)
      ? { direction: NaN, telling: false, swapped: true }
      : directionOf(entry, cases, { outputs, ownBase, base });
    // Not `maxAbs > tolerance`: NaN must fail.
    const passed = difference.maxAbs <= tolerance && change.swapped;
    const { name, adapters } = entry;
    const report = { name, adapters, ...difference, ...change, tolerance, passed };
    onCase(report);
    reports.push(report);
  }
  return reports;
}

/** @param {{adapters: Record<string, number>}} entry */
const isBase = ({ adapters }) => Object.keys(adapters).length === 0;

/** @param {{adapters: Record<string, number>}} entry */
const isSingle = ({ adapters }) => Object.keys(adapters).length === 1;

/**
 * @param {import('./model.js').Model} model
 * @param {ReadCase} entry
 */
async function runCase(model, { adapters, inputs, expected }) {
  const slots = await model.feedsFor(adapters);
  return model.run(inputs, { slots, outputs: [...expected.keys()] });
}

/** @param {import('./manifest.js').Manifest} manifest */
function requireCases(manifest) {
  const cases = [...manifest.golden.values()];
  const proved = new Set(cases.filter(isSingle).flatMap(({ adapters }) => Object.keys(adapters)));
  const missing = [...manifest.adapters.keys()].filter((name) => !proved.has(name));
  if (!cases.some(isBase)) missing.unshift('the base');
  if (missing.length > 0) {
    throw new LoraportError(
      `manifest.json: expected a golden case for each, got none for ${missing.join(', ')}; ` +
        'export or add again',
    );
  }
}

/**
 * @param {import('./model.js').Model} model
 * @param {string} name
 * @returns {Promise<ReadCase>}
 */
async function readCase(model, name) {
  const { golden } = model.bundle.manifest;
  const { adapters, file } = /** @type {import('./manifest.js').GoldenCase} */ (golden.get(name));
  /** @type {ReadCase} */
  const read = { name, adapters, inputs: {}, expected: new Map() };
  for (const [key, tensor] of parseSafetensors(await model.bundle.read(file), file)) {
    const bare = key.slice(key.indexOf('.') + 1);
    if (key.startsWith(INPUT)) read.inputs[bare] = toOrt(model.ort, bare, tensor);
    if (key.startsWith(OUTPUT)) {
      if (!isFiniteTensor(tensor)) {
        throw new LoraportError(`${file}, ${key}: expected finite numbers, got NaN or infinity`);
      }
      read.expected.set(bare, {
        shape: tensor.shape,
        values: asFloat32(/** @type {any} */ (tensor.data)),
      });
    }
  }
  if (read.expected.size === 0) throw new LoraportError(`${file}: expected outputs, got none`);
  return read;
}

/**
 * @param {Record<string, Tensor>} results
 * @param {ReadCase} entry
 * @returns {Map<string, Float32Array>}
 */
function readOutputs(results, { name, expected }) {
  const outputs = new Map();
  for (const [output, { shape }] of expected) {
    const result = results[output];
    if (result === undefined || result.dims.join() !== shape.join()) {
      throw new LoraportError(
        `golden case ${name}, output ${output}: expected shape [${shape}], ` +
          `got ${result === undefined ? 'no such output' : `[${result.dims}]`}`,
      );
    }
    outputs.set(output, asFloat32(/** @type {any} */ (result.data)));
  }
  return outputs;
}

/**
 * @param {ReadCase['expected']} expected
 * @param {Map<string, Float32Array>} outputs of the same names and sizes
 * @returns {{maxAbs: number, relative: number}}
 */
function compare(expected, outputs) {
  let maxAbs = 0;
  let squares = 0;
  let size = 0;
  for (const [name, { values }] of expected) {
    const got = /** @type {Float32Array} */ (outputs.get(name));
    for (let index = 0; index < values.length; index++) {
      const wanted = /** @type {number} */ (values[index]);
      const difference = Math.abs(/** @type {number} */ (got[index]) - wanted);
      // Once NaN, always NaN: no comparison with it is true.
      if (!(difference <= maxAbs)) maxAbs = difference > maxAbs ? difference : NaN;
      squares += difference * difference;
      size += wanted * wanted;
    }
  }
  return { maxAbs, relative: Math.sqrt(squares / (size || 1)) };
}

/**
 * Does a case change the base as its golden outputs do, and more so than as another adapter's?
 * @param {ReadCase} entry
 * @param {ReadCase[]} cases
 * @param {object} here
 * @param {Map<string, Float32Array>} here.outputs of this case
 * @param {Map<string, Float32Array>} here.ownBase of the base, by the same runtime
 * @param {ReadCase} here.base
 * @returns {{direction: number, telling: boolean, swapped: boolean}}
 */
function directionOf(entry, cases, { outputs, ownBase, base }) {
  /** @type {(other: ReadCase) => number} */
  const along = (other) => cosine(outputs, ownBase, other.expected, base.expected);
  const direction = along(entry);
  const golden = new Map([...entry.expected].map(([name, { values }]) => [name, values]));
  const effect = compare(base.expected, golden).relative;
  // The change is between two runs, each with its own rounding.
  const telling = effect > 2 * compare(base.expected, ownBase).relative;
  // A blend lies between its adapters, so it is not asked to be told from them.
  const rivals = isSingle(entry) ? cases.filter((other) => other !== entry && isSingle(other)) : [];
  const right = direction > 0 && rivals.every((other) => direction >= along(other));
  return { direction, telling, swapped: telling ? right : direction !== 0 };
}

/**
 * Cosine of the angle between two changes; 0 where there is none, 1 where there is none in both.
 * @param {Map<string, Float32Array>} outputs
 * @param {Map<string, Float32Array>} ownBase
 * @param {ReadCase['expected']} expected
 * @param {ReadCase['expected']} expectedBase
 * @returns {number}
 */
function cosine(outputs, ownBase, expected, expectedBase) {
  let [product, here, golden] = [0, 0, 0];
  for (const [name, { values }] of expected) {
    const [got, gotBase] = [outputs.get(name), ownBase.get(name)];
    const wantedBase = expectedBase.get(name)?.values;
    if (!got || !gotBase || !wantedBase || wantedBase.length !== values.length) continue;
    for (let index = 0; index < values.length; index++) {
      const change = Number(got[index]) - Number(gotBase[index]);
      const wanted = Number(values[index]) - Number(wantedBase[index]);
      product += change * wanted;
      here += change * change;
      golden += wanted * wanted;
    }
  }
  if (here === 0 && golden === 0) return 1;
  return product === 0 ? 0 : product / Math.sqrt(here * golden);
}
