/** The page: controls in, text out. The model itself is in the worker. */

import { Engine } from './engine.js';

/** @type {(id: string) => any} */
const $ = (id) => document.getElementById(id);
const engine = new Engine(showProgress);
const settings = new URLSearchParams(location.search);
let swaps = 0;

async function open() {
  const bundle = new URL(settings.get('bundle') ?? 'bundle/', location.href);
  if (!bundle.pathname.endsWith('/')) bundle.pathname += '/';
  const runtime = settings.get('runtime') ?? 'auto';
  const facts = await engine.call('open', { bundle: bundle.href, runtime });
  $('loading').hidden = true;
  showFacts(facts);
  fillAdapters(facts.adapters);
  $('controls').disabled = !facts.hasText;
  $('check').disabled = false;
  await setAdapter();
  document.body.dataset.ready = 'true';
}

function showProgress({ path, received, total }) {
  const megabytes = (bytes) => (bytes / 1e6).toFixed(1);
  const of = total === null ? '' : ` of ${megabytes(total)}`;
  const opening = path.endsWith('.data') && received === total ? '; opening it' : '';
  $('progress-label').textContent = `Loading ${path}: ${megabytes(received)}${of} MB${opening}`;
  if (total === null || opening) $('progress').removeAttribute('value');
  else $('progress').value = received / total;
}

function showFacts({ baseName, precision, runtime, threads, notice, fromCache, hasText }) {
  const where = runtime === 'webgpu' ? 'WebGPU' : `WASM, ${threads} thread${threads > 1 ? 's' : ''}`;
  const origin = fromCache > 0 ? ' Read from this browser’s cache.' : '';
  const mute = hasText ? '' : ' This bundle has no tokenizer, so it makes no text.';
  $('model-facts').textContent =
    `${baseName}, ${precision} weights, running on ${where}.${origin}${mute} ${notice}`.trim();
  $('model-facts').hidden = false;
}

function fillAdapters(names) {
  const options = names.map((name) => new Option(name, name));
  $('adapter').replaceChildren(...options, new Option('none: the base', ''));
  $('second').replaceChildren(new Option('nothing', ''), ...names.map((name) => new Option(name, name)));
  $('second-row').hidden = names.length < 2;
}

/** The adapters chosen, with their strengths; null for the base. */
function selection() {
  const chosen = {};
  if ($('adapter').value) chosen[$('adapter').value] = $('strength').valueAsNumber;
  if ($('second').value) {
    chosen[$('second').value] = (chosen[$('second').value] ?? 0) + $('second-strength').valueAsNumber;
  }
  return Object.keys(chosen).length > 0 ? chosen : null;
}

async function setAdapter() {
  const swap = ++swaps;
  const chosen = selection();
  showStrengths();
  const { milliseconds, sessionsOpened } = await engine.call('setAdapter', { selection: chosen });
  if (swap !== swaps) return; // a later one is on its way
  const parts = Object.entries(chosen ?? {}).map(([name, strength]) => `${name} × ${strength.toFixed(2)}`);
  const what = parts.join(' + ') || 'the base';
  $('adapted-heading').textContent = parts.length > 0 ? `With ${what}` : 'No adapter chosen';
  $('swap').textContent =
    `Set ${what} in ${milliseconds.toFixed(1)} ms; the model was opened ${times(sessionsOpened)}.`;
  $('swap').dataset.sessionsOpened = sessionsOpened;
  $('swap').dataset.selection = JSON.stringify(chosen);
  showError('');
}

function showStrengths() {
  for (const id of ['strength', 'second-strength']) {
    $(`${id}-value`).textContent = $(id).valueAsNumber.toFixed(2);
  }
  $('strength').disabled = !$('adapter').value;
  $('second-strength').disabled = !$('second').value;
}

async function generate() {
  showError('');
  for (const side of ['base', 'adapted']) {
    $(`${side}-text`).textContent = '';
    $(`${side}-speed`).textContent = '';
  }
  busy(true);
  $('status').textContent = 'Generating …';
  const options = {
    maxNewTokens: $('max-new-tokens').valueAsNumber,
    temperature: $('temperature').valueAsNumber,
    seed: $('seed').valueAsNumber,
  };
  try {
    const given = { prompt: $('prompt').value.trim(), options };
    const sides = await engine.call('generate', given, ({ side, piece }) => {
      $(`${side}-text`).append(piece);
    });
    for (const { side, count, milliseconds } of sides) {
      const each = count > 0 ? `, ${(milliseconds / count).toFixed(0)} ms each` : '';
      $(`${side}-speed`).textContent = `${count} pieces${each}`;
    }
    $('status').textContent = 'Done.';
  } catch (error) {
    $('status').textContent = '';
    throw error;
  } finally {
    busy(false);
  }
}

function busy(yes) {
  document.body.classList.toggle('busy', yes);
  $('controls').disabled = yes;
  $('check').disabled = yes;
  $('stop').hidden = !yes;
  if (yes) $('stop').focus();
  else $('generate').focus();
}

async function check() {
  const table = $('check-table');
  table.tBodies[0].replaceChildren();
  table.hidden = false;
  $('check').disabled = true;
  $('check-status').textContent = 'Checking …';
  try {
    const reports = await engine.call('check', {}, ({ report }) => {
      table.tBodies[0].append(row(report));
    });
    const failed = reports.filter((report) => !report.passed).length;
    $('check-status').textContent = failed
      ? `${failed} of ${reports.length} cases differ.`
      : `All files are intact and all ${reports.length} cases agree.`;
  } catch (error) {
    table.hidden = true;
    $('check-status').textContent = '';
    throw error;
  } finally {
    $('check').disabled = false;
  }
}

function row({ name, maxAbs, relative, direction, telling, tolerance, passed }) {
  const made = document.createElement('tr');
  const tooWeak = Number.isNaN(direction) ? '–' : 'too weak to tell';
  const change = telling ? direction.toFixed(2) : tooWeak;
  for (const text of [name, maxAbs.toExponential(1), tolerance, change, passed ? '✓ agrees' : '✗ differs']) {
    made.insertCell().textContent = text;
  }
  made.lastElementChild.className = passed ? 'passed' : 'failed';
  made.dataset.maxAbs = maxAbs;
  made.dataset.relative = relative;
  made.dataset.direction = direction;
  return made;
}

async function forget() {
  await engine.call('forget');
  $('check-status').textContent = 'Deleted. The files are fetched again when the page is next opened.';
}

const times = (count) => (count === 1 ? 'once' : `${count} times`);

function showError(message) {
  $('error').textContent = message;
  $('error').hidden = message === '';
}

/** Run an action; whatever goes wrong is shown, not lost. */
const shown = (action) => async (event) => {
  event?.preventDefault();
  try {
    await action();
  } catch (error) {
    showError(error.message);
  }
};

$('form').addEventListener('submit', shown(generate));
$('stop').addEventListener('click', shown(() => engine.call('stop')));
$('check').addEventListener('click', shown(check));
$('forget').addEventListener('click', shown(forget));
for (const id of ['adapter', 'strength', 'second', 'second-strength']) {
  $(id).addEventListener('input', shown(setAdapter));
}
await shown(open)();
if (!$('error').hidden) $('loading').hidden = true;
