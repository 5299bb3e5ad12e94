"""Swap a bundle's adapters with ONNX Runtime GenAI alone: no loraport is imported.

    python samples/genai/swap.py BUNDLE PROMPT [ADAPTER]...

The bundle opens as it is; its ``.onnx_adapter`` files load by ``Adapters``. Exit code 0 is done;
2 is wrong usage, an adapter that the bundle lacks or what GenAI refuses, with one message.
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import onnxruntime_genai as og


class Swapper:
    def __init__(self, bundle: Path) -> None:
        self.model = og.Model(str(bundle))
        settings = json.loads((bundle / "genai_config.json").read_text(encoding="utf-8"))
        self.longest = int(settings["model"]["context_length"])
        manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
        self.border = manifest.get("long_rotations_after")
        self.tokenizer = og.Tokenizer(self.model)
        self.adapters = og.Adapters(self.model)
        files = sorted((bundle / "adapters").glob("*.onnx_adapter"))
        self.names = [file.name.removesuffix(".onnx_adapter") for file in files]
        for name, file in zip(self.names, files, strict=True):
            self.adapters.load(str(file), name)

    def generate(self, prompt: str, adapter: str | None, new_tokens: int = 48) -> Iterator[int]:
        tokens = self.tokenizer.encode(self._chat(prompt))
        parameters = og.GeneratorParams(self.model)
        length = max(len(tokens), min(len(tokens) + new_tokens, self.longest))
        parameters.set_search_options(max_length=length, do_sample=False)
        generator = og.Generator(self.model, parameters)
        if adapter is not None:
            generator.set_active_adapter(self.adapters, adapter)
        generator.append_tokens(tokens)
        length = len(tokens)
        while not generator.is_done():
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])
            length += 1
            # Longer texts are rotated by other factors: what is in the cache no longer holds.
            if length - 1 == self.border and not generator.is_done():
                text = generator.get_sequence(0)
                generator.rewind_to(0)
                generator.append_tokens(text)

    def _chat(self, prompt: str) -> str:
        messages = json.dumps([{"role": "user", "content": prompt}])
        return str(
            self.tokenizer.apply_chat_template(messages=messages, add_generation_prompt=True)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="What the base and adapters of a bundle say.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("prompt")
    parser.add_argument("adapters", nargs="*", metavar="ADAPTER")
    asked = parser.parse_args()
    try:
        swapper = Swapper(asked.bundle)
        if unknown := [name for name in asked.adapters if name not in swapper.names]:
            parser.exit(
                2,
                f"error: adapters of {asked.bundle}: expected of "
                f"{', '.join(swapper.names) or 'none'}, got {', '.join(unknown)}\n",
            )
        for adapter in (None, *asked.adapters):
            text = swapper.tokenizer.decode(list(swapper.generate(asked.prompt, adapter)))
            print(f"{adapter or 'base'}: {text}")
    except (RuntimeError, OSError) as error:  # GenAI's own faults are RuntimeErrors
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
