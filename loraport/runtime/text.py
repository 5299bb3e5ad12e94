"""Text in, text out: the tokenizer and chat template of a bundle."""

from __future__ import annotations

import time
from collections.abc import Iterator

from loraport.base.loading import load_tokenizer
from loraport.counts import counted
from loraport.errors import LoraportError
from loraport.runtime.generation import Sampling, generate
from loraport.runtime.model import Runtime, Selection, require_runtime


class TextGenerator:
    """Generates text with a bundle's own tokenizer.

    Args:
        runtime: An opened bundle of a decoder language model.

    Raises:
        LoraportError: If the bundle has no tokenizer.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = require_runtime(runtime)
        self._tokenizer = load_tokenizer(str(runtime.directory))
        self.last_speed = ""

    def tokens(self, prompt: str, *, chat: bool = True) -> list[int]:
        """Return a prompt's tokens.

        Args:
            prompt: What the user says.
            chat: Wrap it in the model's chat template, if it has one.

        Raises:
            LoraportError: If it is no text, or came from bytes that are not UTF-8.
        """
        if not isinstance(prompt, str):
            raise LoraportError(f"prompt: expected a text, got {prompt!r}")
        try:
            prompt.encode()
        except UnicodeEncodeError as error:
            raise LoraportError(
                f"prompt: expected text in UTF-8, got {error.object[error.start]!a} at character "
                f"{error.start}"
            ) from error
        if chat and self._tokenizer.chat_template:
            prompt = str(
                self._tokenizer.apply_chat_template(
                    [{"role": "user", "content": prompt}],
                    tokenize=False,
                    add_generation_prompt=True,
                )
            )
            return _ids(self._tokenizer(prompt, add_special_tokens=False)["input_ids"])
        return _ids(self._tokenizer(prompt)["input_ids"])

    def stream(
        self,
        prompt: str,
        adapter: Selection = None,
        sampling: Sampling | None = None,
        *,
        chat: bool = True,
    ) -> Iterator[str]:
        """Yield the text piece by piece, as it is generated.

        Raises:
            LoraportError: If the prompt is empty or too long, or the adapter unknown.
        """
        token_ids = self.tokens(prompt, chat=chat)
        if not token_ids:
            raise LoraportError("prompt: expected some text, got none")
        started = time.perf_counter()
        new: list[int] = []
        shown = text = ""
        for token in generate(self._runtime, token_ids, adapter, sampling):
            new.append(token)
            text = str(self._tokenizer.decode(new, skip_special_tokens=True))
            # A character of several tokens is incomplete until its last one has come.
            if text.endswith("�"):
                continue
            yield text[len(shown) :]
            shown = text
        if text != shown:
            yield text[len(shown) :]
        seconds = time.perf_counter() - started
        self.last_speed = (
            f"{counted(len(new), 'token')}, {len(new) / max(seconds, 1e-9):.1f} tokens/s"
        )

    def generate(
        self,
        prompt: str,
        adapter: Selection = None,
        sampling: Sampling | None = None,
        *,
        chat: bool = True,
    ) -> str:
        """Return the whole text; see `stream`."""
        return "".join(self.stream(prompt, adapter, sampling, chat=chat))


def _ids(value: object) -> list[int]:
    assert isinstance(value, list)
    return [int(token) for token in value]
