export { readDecoder } from "./decoder.js";
export { generate } from "./generation.js";
export { checkGolden } from "./golden.js";
export { toleranceFor } from "./manifest.js";
export { TextGenerator } from "./text.js";
export { Bundle, damagedFile, missingFile } from "./bundle.js";
export { LoraportError, Problems, firstLine } from "./errors.js";
export { Model, toOrt } from "./model.js";
