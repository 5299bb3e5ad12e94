/** With the bundle that LORAPORT_BUNDLE names: a decoder with two adapters and a tokenizer. */

import assert from 'node:assert/strict';
import test from 'node:test';

import { LoraportError, checkGolden, generate, openModel, openText } from '../src/index.js';

const directory = process.env.LORAPORT_BUNDLE;
const options = { skip: directory ? false : 'LORAPORT_BUNDLE names no bundle' };
const model = directory ? await openModel(directory) : null;
const [first, second] = model?.bundle.adapters ?? [];
const prompt = [3, 4, 5, 6, 7];

/** Tokens of a greedy text. */
async function tokens(adapter, more = {}) {
  const found = [];
  for await (const token of generate(model, prompt, { adapter, maxNewTokens: 12, ...more })) {
    found.push(token);
  }
  return found;
}

/** Logits of the prompt with the adapter that is set. */
async function logits() {
  const { Tensor } = model.ort;
  const row = (values) => new Tensor('int64', BigInt64Array.from(values, BigInt), [1, values.length]);
  const inputs = {};
  for (const { name, shape, type } of model.session.inputMetadata) {
    if (!model.inputNames.includes(name)) continue;
    if (name === 'input_ids') inputs[name] = row(prompt);
    else if (name === 'attention_mask') inputs[name] = row(prompt.map(() => 1));
    else if (name === 'position_ids') inputs[name] = row(prompt.map((_, index) => index));
    else {
      const [, heads, , size] = shape.map(Number);
      inputs[name] = new Tensor(type, new Float32Array(), [1, heads, 0, size || headSize]);
    }
  }
  return (await model.run(inputs, { outputs: ['logits'] })).logits.data;
}

const config = model && (await model.bundle.readJson('genai_config.json'));
const headSize = config?.model.decoder.head_size;

test('every golden case agrees', options, async () => {
  const reports = await checkGolden(model, 'native');
  assert.ok(reports.length >= 4);
  for (const report of reports) assert.ok(report.passed, JSON.stringify(report));
});

/** Names of the golden cases that fail while the model feeds its slots with something else. */
async function failing(feedsFor, tolerance) {
  const { manifest } = model.bundle;
  const allowed = manifest.tolerance;
  model.feedsFor = feedsFor;
  manifest.tolerance = tolerance ?? allowed;
  try {
    const reports = await checkGolden(model, 'native');
    return reports.flatMap(({ name, passed }) => (passed ? [] : [name]));
  } finally {
    delete model.feedsFor;
    manifest.tolerance = allowed;
  }
}

test('a swap that does nothing fails, whatever difference is allowed', options, async () => {
  const dead = () => Object.getPrototypeOf(model).feedsFor.call(model, null);
  const adapted = [`adapter-${first}`, `adapter-${second}`, 'blend'];
  assert.deepEqual(await failing(dead), adapted);
  assert.deepEqual(await failing(dead, Infinity), adapted);
});

test('another adapter in its place fails, whatever difference is allowed', options, async () => {
  const mixed = (wanted) => {
    const one = Object.keys(wanted ?? {}).length === 1 && first in wanted;
    return Object.getPrototypeOf(model).feedsFor.call(model, one ? second : wanted);
  };
  assert.deepEqual(await failing(mixed), [`adapter-${first}`]);
  assert.deepEqual(await failing(mixed, Infinity), [`adapter-${first}`]);
});

test('base → A → B → A → base repeats bit for bit, in one session', options, async () => {
  const seen = [];
  for (const adapter of [null, first, second, first, null]) {
    await model.setAdapter(adapter);
    assert.equal(model.adapter, adapter);
    seen.push(await logits());
  }
  assert.deepEqual(seen[3], seen[1]);
  assert.deepEqual(seen[4], seen[0]);
  assert.notDeepEqual(seen[1], seen[0]);
  assert.notDeepEqual(seen[2], seen[1]);
});

test('the adapter that was asked for last is set, whichever is read first', options, async () => {
  await model.setAdapter(null);
  const base = await logits();
  model.bundle.unloadAdapter(first);
  const slow = model.setAdapter(first); // reads a file
  const quick = model.setAdapter(null); // reads none
  await Promise.all([slow, quick]);
  assert.equal(model.adapter, null);
  assert.deepEqual(await logits(), base);
  model.bundle.unloadAdapter(first);
  await Promise.all([model.setAdapter(first), assert.rejects(model.setAdapter('missing'))]);
  assert.equal(model.adapter, first); // what is refused sets nothing
  assert.notDeepEqual(await logits(), base);
});

test('strength 0 is the base, and the effect grows with the strength', options, async () => {
  await model.setAdapter(null);
  const base = await logits();
  const distances = [];
  for (const strength of [0, 0.25, 0.5, 1]) {
    await model.setAdapter({ [first]: strength });
    const now = await logits();
    distances.push(Math.hypot(...now.map((value, index) => value - base[index])));
  }
  await model.setAdapter(null);
  assert.equal(distances[0], 0);
  assert.deepEqual(distances, [...distances].sort((a, b) => a - b));
  assert.ok(distances[1] > 0);
});

test('with the KV cache as without', options, async () => {
  for (const adapter of [null, first, { [first]: 0.5, [second]: 1 }]) {
    const cached = await tokens(adapter, { maxNewTokens: 5 });
    const again = [];
    for (let length = 0; length < cached.length; length++) {
      for await (const token of generate(model, [...prompt, ...again], { adapter, maxNewTokens: 1 })) {
        again.push(token);
      }
    }
    assert.deepEqual(again, cached);
    assert.ok(cached.length > 0);
  }
});

test('texts in turns keep their own adapter and cache', options, async () => {
  const [alone, other] = [await tokens(first), await tokens(null)];
  const runs = [generate(model, prompt, { adapter: first, maxNewTokens: 12 }), generate(model, prompt, { adapter: null, maxNewTokens: 12 })];
  const found = [[], []];
  for (let turn = 0; turn < 13; turn++) {
    for (const [index, run] of runs.entries()) {
      const { done, value } = await run.next();
      if (!done) found[index].push(value);
    }
    await model.setAdapter(turn % 2 ? second : null);
  }
  await model.setAdapter(null);
  assert.deepEqual(found, [alone, other]);
  assert.notDeepEqual(alone, other);
});

test('a text stops when it is told to', options, async () => {
  const stop = new AbortController();
  const found = [];
  for await (const token of generate(model, prompt, { maxNewTokens: 12, signal: stop.signal })) {
    found.push(token);
    if (found.length === 2) stop.abort();
  }
  assert.equal(found.length, 2);
});

test('the same seed samples the same text, another seed another', options, async () => {
  const sample = (seed) => tokens(first, { temperature: 1.5, seed });
  assert.deepEqual(await sample(1), await sample(1));
  assert.notDeepEqual(await sample(1), await sample(2));
});

test('streamed pieces are the whole text', options, async () => {
  const text = await openText(model);
  const pieces = [];
  for await (const piece of text.stream('Größe 東京 🚢', { adapter: first, maxNewTokens: 20 })) {
    pieces.push(piece);
  }
  assert.equal(pieces.join(''), await text.generate('Größe 東京 🚢', { adapter: first, maxNewTokens: 20 }));
  assert.ok(pieces.length > 1);
});

for (const [what, selection, message] of [
  ['an unknown adapter', 'nobody', /adapter "nobody": expected one of the bundle's/],
  ['a name that every object has', 'constructor', /adapter "constructor": expected one/],
  ['a strength that is NaN', { [first]: NaN }, /strength of .*: expected a finite number, got NaN/],
  ['a strength that is infinite', { [first]: Infinity }, /finite number, got Infinity/],
  ['a strength that is a text', { [first]: '1' }, /finite number/],
  ['a map of strengths', new Map([[first, 1]]), /adapters: expected a name, .* base, got Map$/],
  ['a list of names', [first], /an object of names with strengths, .* got Array$/],
  ['a number', 1, /for the base, got 1$/],
  ['undefined', undefined, /for the base, got undefined$/],
]) {
  test(`${what} is refused and the adapter stays`, options, async () => {
    await model.setAdapter(second);
    await assert.rejects(model.setAdapter(selection), (error) => {
      assert.ok(error instanceof LoraportError);
      assert.match(error.message, message);
      return true;
    });
    assert.equal(model.adapter, second);
    await model.setAdapter(null);
  });
}

test('a prompt that is no text is refused', options, async () => {
  const text = await openText(model);
  for (const [prompt, got] of [[undefined, 'undefined'], [null, 'null'], [7, 'number'], [['a'], 'object']]) {
    const expected = { name: 'LoraportError', message: `prompt: expected a text, got ${got}` };
    await assert.rejects(text.generate(prompt), expected);
    assert.throws(() => text.tokens(prompt, { chat: false }), expected);
  }
  assert.ok(text.tokens('undefined').length > 0);
});

test('a runtime that does not exist is refused', options, async () => {
  for (const runtime of ['cuda', undefined]) {
    const expected = { name: 'LoraportError', message: `runtime: expected native, wasm, webgpu, got ${runtime}` };
    await assert.rejects(checkGolden(model, runtime), expected);
  }
});

test('missing and unknown inputs are named together', options, async () => {
  await assert.rejects(model.run({ other: null }), /input_ids: expected a tensor[^]*other: expected one/);
});

test('tokens that do not exist are refused', options, async () => {
  const last = config.model.vocab_size - 1;
  for (const token of [-1, last + 1, 0.5]) {
    const expected = { name: 'LoraportError', message: `prompt: expected tokens from 0 to ${last}, got ${token}` };
    await assert.rejects(generate(model, [5, token, 7]).next(), expected);
  }
  await assert.rejects(generate(model, '57').next(), { name: 'LoraportError', message: /got 5$/ });
  assert.equal((await generate(model, [5, last, 0]).next()).done, false);
});

test('an empty prompt is refused', options, async () => {
  await assert.rejects(generate(model, []).next(), /prompt: expected 1 to/);
});
