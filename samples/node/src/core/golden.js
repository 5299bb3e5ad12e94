/** Replay a bundle's golden cases: does this runtime compute what the manifest says? */

import { LoraportError } from './errors.js';
import { toleranceFor } from './manifest.js';
import { toOrt } from './model.js';
import { parseSafetensors } from './safetensors.js';
import { asFloat32 } from './tensor_types.js';

/**
 * @typedef {object} CaseReport
 * @property {string} name
 * @property {Record<string, number>} adapters name → strength; empty for the base
 * @property {number} maxAbs largest difference of any element; NaN where an output has NaN
 * @property {number} relative Frobenius norm of the difference, relative to the expected outputs
 * @property {number} tolerance largest difference allowed
 * @property {boolean} passed
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
  const reports = [];
  for (const [name, { adapters, file }] of manifest.golden) {
    const tensors = parseSafetensors(await model.bundle.read(file), file);
    /** @type {Record<string, import('onnxruntime-common').Tensor>} */
    const inputs = {};
    const expected = new Map();
    for (const [key, tensor] of tensors) {
      const bare = key.slice(key.indexOf('.') + 1);
      if (key.startsWith(INPUT)) inputs[bare] = toOrt(model.ort, bare, tensor);
      if (key.startsWith(OUTPUT)) expected.set(bare, tensor);
    }
    const slots = await model.feedsFor(adapters);
    const outputs = await model.run(inputs, { slots, outputs: [...expected.keys()] });
    const difference = compare(expected, outputs);
    // Not `maxAbs > tolerance`: NaN must fail.
    const report = { name, adapters, ...difference, tolerance, passed: difference.maxAbs <= tolerance };
    onCase(report);
    reports.push(report);
  }
  return reports;
}

/** @param {import('./manifest.js').Manifest} manifest */
function requireCases(manifest) {
  const cases = [...manifest.golden.values()].map(({ adapters }) => Object.keys(adapters));
  const proved = new Set(cases.filter((names) => names.length === 1).flat());
  const missing = [...manifest.adapters.keys()].filter((name) => !proved.has(name));
  if (!cases.some((names) => names.length === 0)) missing.unshift('the base');
  if (missing.length > 0) {
    throw new LoraportError(
      `manifest.json: expected a golden case for each, got none for ${missing.join(', ')}; ` +
        'export or add again',
    );
  }
}

/**
 * @param {Map<string, import('./tensor_types.js').PlainTensor>} expected
 * @param {Record<string, import('onnxruntime-common').Tensor>} outputs
 * @returns {{maxAbs: number, relative: number}}
 */
function compare(expected, outputs) {
  if (expected.size === 0) throw new LoraportError('golden case: expected outputs, got none');
  let maxAbs = 0;
  let squares = 0;
  let size = 0;
  for (const [name, tensor] of expected) {
    const output = outputs[name];
    if (output === undefined || output.dims.join() !== tensor.shape.join()) {
      throw new LoraportError(
        `output ${name}: expected shape [${tensor.shape}], got [${output?.dims ?? 'none'}]`,
      );
    }
    const wanted = asFloat32(/** @type {any} */ (tensor.data));
    const got = asFloat32(/** @type {any} */ (output.data));
    for (let index = 0; index < wanted.length; index++) {
      const difference = Math.abs(Number(got[index]) - Number(wanted[index]));
      // Math.max would do, but must keep NaN once it has come.
      if (!(difference <= maxAbs)) maxAbs = Number.isNaN(maxAbs) ? NaN : difference;
      squares += difference * difference;
      size += Number(wanted[index]) ** 2;
    }
  }
  return { maxAbs, relative: Math.sqrt(squares / (size || 1)) };
}
