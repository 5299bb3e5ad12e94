/** The model, in a worker, so that the page stays alive while it computes. */

import { Template } from './vendor/jinja.mjs';
import { Tokenizer } from './vendor/tokenizers.mjs';
import { Bundle, LoraportError, TextGenerator, checkGolden } from './vendor/core/index.js';
import { openModel } from './session.js';
import { forgetAll, webStore } from './web_store.js';

/** @type {{model: any, runtime: string, text: TextGenerator | null} | null} */
let opened = null;
let sessionsOpened = 0;
let stopping = new AbortController();

const methods = {
  async open({ bundle: address, runtime: wanted }) {
    if (!isSecureContext) {
      throw new LoraportError('this page: expected https:// or localhost, got a plain http address');
    }
    const store = webStore(new URL(address), (progress) => self.postMessage({ progress }));
    const bundle = await Bundle.open(store);
    const { model, runtime, threads, notice } = await openModel(bundle, wanted);
    sessionsOpened += 1;
    const hasText = bundle.manifest.files.has('tokenizer.json');
    const text = hasText ? await TextGenerator.open(model, { Tokenizer, Template }) : null;
    opened = { model, runtime, text };
    const { baseName, precision } = bundle.manifest;
    const { adapters } = bundle;
    return { baseName, precision, adapters, runtime, threads, notice, fromCache: store.cached, hasText };
  },

  async setAdapter({ selection }) {
    const started = performance.now();
    await require().model.setAdapter(selection);
    return { milliseconds: performance.now() - started, sessionsOpened };
  },

  /** Base and adapted in turns, token by token, in the one session. */
  async generate({ prompt, options }, tell) {
    const { text } = require();
    if (text === null) throw new LoraportError('this bundle has no tokenizer, so it makes no text');
    stopping = new AbortController();
    const { signal } = stopping;
    const sides = [
      { side: 'base', pieces: text.stream(prompt, { ...options, signal, adapter: null }) },
      { side: 'adapted', pieces: text.stream(prompt, { ...options, signal }) },
    ].map((entry) => ({ ...entry, count: 0, milliseconds: 0, done: false }));
    while (sides.some((entry) => !entry.done)) {
      for (const entry of sides.filter((candidate) => !candidate.done)) {
        const started = performance.now();
        const { done, value } = await entry.pieces.next();
        entry.milliseconds += performance.now() - started;
        entry.done = done;
        if (done) continue;
        entry.count += 1;
        tell({ side: entry.side, piece: value });
        await letMessagesIn();
      }
    }
    return sides.map(({ side, count, milliseconds }) => ({ side, count, milliseconds }));
  },

  async stop() {
    stopping.abort();
  },

  /** Every file against its sha256, then every golden case. */
  async check(_, tell) {
    const { model, runtime } = require();
    await model.bundle.checkFiles();
    return checkGolden(model, runtime, (report) => tell({ report }));
  },

  async forget() {
    await forgetAll();
  },
};

function require() {
  if (opened === null) throw new LoraportError('the model is not open yet');
  return opened;
}

/** A message that waits, e.g. to stop, is handled before the next token. */
function letMessagesIn() {
  return new Promise((resolve) => {
    setTimeout(resolve);
  });
}

self.addEventListener('message', async ({ data: { id, method, given } }) => {
  const tell = (event) => self.postMessage({ id, event });
  try {
    const result = await methods[method](given, tell);
    self.postMessage({ id, result });
  } catch (error) {
    const expected = error instanceof LoraportError;
    if (!expected) console.error(error);
    self.postMessage({ id, error: expected ? error.message : `unexpected: ${error}` });
  }
});
