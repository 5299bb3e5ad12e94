/**
 * Read the arguments.
 * @param {string[]} argv
 * @throws {LoraportError} if they are not as the usage says
 */
export function readArguments(argv: string[]): {
    json: boolean;
    prompt: string;
    adapter: Record<string, number> | null;
    chat: boolean;
    maxNewTokens: number;
    temperature: number;
    topP: number;
    seed: number;
    command: string;
    bundle: string;
};
export const USAGE: "usage:\n  loraport-node check BUNDLE [--json]\n      replay the golden cases of the base, every adapter and the blend\n  loraport-node generate BUNDLE --prompt TEXT [--adapter NAME[=STRENGTH]]... [--raw]\n      [--max-new-tokens 128] [--temperature 0] [--top-p 1] [--seed 0]\n      generate text; several adapters are blended; --raw leaves out the chat template\n  loraport-node bench BUNDLE [--json]\n      measure what a swap, a blend and an adapter cost\n\nexit code: 0 done, 1 a golden case differs, 2 wrong usage or a damaged bundle";
