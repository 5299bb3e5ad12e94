/** The command line's arguments. */

import { parseArgs } from 'node:util';

import { LoraportError, firstLine } from './core/index.js';

export const USAGE = `usage:
  loraport-node check BUNDLE [--json]
      replay the golden cases of the base, every adapter and the blend
  loraport-node generate BUNDLE --prompt TEXT [--adapter NAME[=STRENGTH]]... [--raw]
      [--max-new-tokens 128] [--temperature 0] [--top-p 1] [--seed 0]
      generate text; several adapters are blended; --raw leaves out the chat template
  loraport-node bench BUNDLE [--json]
      measure what a swap, a blend and an adapter cost

exit code: 0 done, 1 a golden case differs, 2 wrong usage or a damaged bundle`;

/** @satisfies {import('node:util').ParseArgsConfig['options']} */
const OPTIONS = {
  help: { type: 'boolean', short: 'h', default: false },
  json: { type: 'boolean', default: false },
  prompt: { type: 'string' },
  adapter: { type: 'string', multiple: true, default: /** @type {string[]} */ ([]) },
  raw: { type: 'boolean', default: false },
  'max-new-tokens': { type: 'string', default: '128' },
  temperature: { type: 'string', default: '0' },
  'top-p': { type: 'string', default: '1' },
  seed: { type: 'string', default: '0' },
};

const GENERATE_ONLY = ['prompt', 'adapter', 'raw', 'max-new-tokens', 'temperature', 'top-p', 'seed'];

/**
 * Read the arguments.
 * @param {string[]} argv
 * @throws {LoraportError} if they are not as the usage says
 */
export function readArguments(argv) {
  const { values, positionals, tokens } = parse(argv);
  const [command, bundle, ...rest] = positionals;
  if (values.help) return { command: 'help', bundle: '', ...choices(values) };
  if (!['check', 'generate', 'bench'].includes(command ?? '') || !bundle || rest.length > 0) {
    throw new LoraportError(`expected a command and a bundle\n${USAGE}`);
  }
  const given = tokens.flatMap((token) => (token.kind === 'option' ? [token.name] : []));
  const foreign = given.find((name) =>
    GENERATE_ONLY.includes(name) ? command !== 'generate' : command === 'generate',
  );
  if (foreign) throw new LoraportError(`${command} takes no --${foreign}\n${USAGE}`);
  if (command === 'generate' && values.prompt === undefined) {
    throw new LoraportError(`generate: expected --prompt TEXT, got none\n${USAGE}`);
  }
  return { command: String(command), bundle, ...choices(values) };
}

/** @param {string[]} argv */
function parse(argv) {
  try {
    return parseArgs({ args: argv, options: OPTIONS, allowPositionals: true, tokens: true });
  } catch (error) {
    throw new LoraportError(`${firstLine(error)}\n${USAGE}`);
  }
}

/** @param {ReturnType<typeof parse>['values']} values */
function choices(values) {
  return {
    json: values.json,
    prompt: values.prompt ?? '',
    adapter: readStrengths(values.adapter),
    chat: !values.raw,
    maxNewTokens: toNumber('max-new-tokens', values['max-new-tokens']),
    temperature: toNumber('temperature', values.temperature),
    topP: toNumber('top-p', values['top-p']),
    seed: toNumber('seed', values.seed),
  };
}

/**
 * @param {string} name
 * @param {string} text
 */
function toNumber(name, text) {
  const value = text.trim() === '' ? NaN : Number(text);
  if (Number.isFinite(value)) return value;
  throw new LoraportError(`--${name}: expected a finite number, got ${JSON.stringify(text)}`);
}

/**
 * @param {string[]} entries `NAME` or `NAME=STRENGTH`
 * @returns {Record<string, number> | null} null for the base
 */
function readStrengths(entries) {
  if (entries.length === 0) return null;
  /** @type {Map<string, number>} */
  const strengths = new Map();
  for (const entry of entries) {
    const split = entry.lastIndexOf('=');
    const name = split < 0 ? entry : entry.slice(0, split);
    if (strengths.has(name)) throw new LoraportError(`--adapter ${name}: expected once, got twice`);
    strengths.set(name, split < 0 ? 1 : toNumber(`adapter ${name}`, entry.slice(split + 1)));
  }
  return Object.fromEntries(strengths);
}
