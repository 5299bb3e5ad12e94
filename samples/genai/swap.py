"""Swap a bundle's adapters with ONNX Runtime GenAI alone: no loraport is imported.

    python samples/genai/swap.py BUNDLE PROMPT [ADAPTER]...

The bundle opens as it is; its ``.onnx_adapter`` files load by ``Adapters``.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import onnxruntime_genai as og


class Swapper:
    def __init__(self, bundle: Path) -> None:
        self.model = og.Model(str(bundle))
        self.tokenizer = og.Tokenizer(self.model)
        self.adapters = og.Adapters(self.model)
        for file in sorted((bundle / "adapters").glob("*.onnx_adapter")):
            self.adapters.load(str(file), file.stem)

    def generate(self, prompt: str, adapter: str | None, new_tokens: int = 48) -> Iterator[int]:
        tokens = self.tokenizer.encode(self._chat(prompt))
        parameters = og.GeneratorParams(self.model)
        parameters.set_search_options(max_length=len(tokens) + new_tokens, do_sample=False)
        generator = og.Generator(self.model, parameters)
        if adapter is not None:
            generator.set_active_adapter(self.adapters, adapter)
        generator.append_tokens(tokens)
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])

    def _chat(self, prompt: str) -> str:
        messages = json.dumps([{"role": "user", "content": prompt}])
        return str(
            self.tokenizer.apply_chat_template(messages=messages, add_generation_prompt=True)
        )


def main(bundle: str, prompt: str, *adapters: str) -> None:
    swapper = Swapper(Path(bundle))
    for adapter in (None, *adapters):
        text = swapper.tokenizer.decode(list(swapper.generate(prompt, adapter)))
        print(f"{adapter or 'base'}: {text}")


if __name__ == "__main__":
    main(*sys.argv[1:])
