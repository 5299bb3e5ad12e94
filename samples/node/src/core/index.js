/** What node and browser share: everything but where files lie and how a session is opened. */

export { Bundle, damagedFile, missingFile } from './bundle.js';
export { readDecoder } from './decoder.js';
export { LoraportError, Problems, firstLine } from './errors.js';
export { generate } from './generation.js';
export { checkGolden } from './golden.js';
export { toleranceFor } from './manifest.js';
export { Model, toOrt } from './model.js';
export { TextGenerator } from './text.js';
