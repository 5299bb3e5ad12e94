// Writes llama.cpp's probabilities for each next token as JSON: one list per input token.
// usage: node llama_logits.mjs NODE_MODULES MODEL.gguf ADAPTER.gguf|- TOKEN,TOKEN,... OUT.json
import fs from "node:fs";
import path from "node:path";
import {pathToFileURL} from "node:url";

const [modules, modelPath, adapter, tokenList, out] = process.argv.slice(2);
const entry = path.join(modules, "node-llama-cpp", "dist", "index.js");
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(entry));

const llama = await getLlama({
    gpu: false, build: "never", usePrebuiltBinaries: true, maxThreads: 1,
    logLevel: LlamaLogLevel.error, progressLogs: false,
});
const model = await llama.loadModel({modelPath});
const context = await model.createContext({
    contextSize: 128, sequences: 1,
    experimentalKvCacheKeyType: "F32", experimentalKvCacheValueType: "F32", flashAttention: false,
    lora: adapter === "-" ? undefined : {adapters: [{filePath: adapter, scale: 1}]},
});
const tokens = tokenList.split(",").map(Number);
const results = await context.getSequence().controlledEvaluate(
    tokens.map((token) => [token, {generateNext: {probabilities: true}}])
);
fs.writeFileSync(out, JSON.stringify(results.map((result) => {
    const row = new Array(result.next.probabilities.size).fill(0);
    for (const [token, probability] of result.next.probabilities) row[token] = probability;
    return row;
})));
process.exit(0);
