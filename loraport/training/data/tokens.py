"""Turn records into rows of tokens, marking what the loss counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraport.errors import LoraportError
from loraport.training.data.batches import IGNORED, Row
from loraport.training.data.records import BadLines, Record, read_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Rows:
    """A data file as rows.

    Attributes:
        rows: What can be learned from.
        truncated: Rows that were cut to the largest length.
        dropped: Line numbers of rows left out because nothing to be learned was left of them.
    """

    rows: tuple[Row, ...]
    truncated: int
    dropped: tuple[int, ...]

    def notes(self, path: Path, length: int) -> Iterator[str]:
        """Say what was cut and left out, if anything.

        Args:
            path: The file.
            length: The largest length.
        """
        if self.truncated:
            yield f"{path}: {self.truncated} rows were cut to {length} tokens"
        if self.dropped:
            lines = ", ".join(map(str, self.dropped[:10])) + (" ..." if self.dropped[10:] else "")
            yield (
                f"{path}: {len(self.dropped)} rows were left out, since nothing of their answer is "
                f"within {length} tokens (lines {lines})"
            )


def read_rows(path: Path, tokenizer: PreTrainedTokenizerBase, max_length: int) -> Rows:
    """Read a JSONL file and tokenize it.

    Args:
        path: See `loraport.training.data.records.read_records`.
        tokenizer: The base's.
        max_length: Rows are cut to this many tokens.

    Raises:
        LoraportError: All bad lines at once, or no row can be used.
    """
    bad = BadLines(path)
    rows: list[Row] = []
    truncated, dropped = 0, []
    records = read_records(path, bad)
    if any(record.messages for record in records):
        _require_chat(tokenizer)
    for record in records:
        try:
            row = _row(record, tokenizer)
        except _UnusableError as error:
            bad.add(record.line, str(error))
            continue
        truncated += len(row.tokens) > max_length
        row = Row(row.tokens[:max_length], row.labels[:max_length], record.line)
        # The first token is never predicted: there is nothing before it.
        if all(label == IGNORED for label in row.labels[1:]):
            dropped.append(record.line)
        else:
            rows.append(row)
    bad.raise_if_any()
    if not rows:
        reason = f"{len(dropped)} rows whose answer is cut off at {max_length} tokens; raise it"
        raise LoraportError(f"{path}: expected rows to learn, got {reason if dropped else 'none'}")
    return Rows(tuple(rows), truncated, tuple(dropped))


class _UnusableError(Exception):
    """Why a record cannot be tokenized."""


def _row(record: Record, tokenizer: PreTrainedTokenizerBase) -> Row:
    if record.messages:
        return _chat_row(record.messages, record.tools, tokenizer)
    if record.completion is not None:
        return _completion_row(record.prompt, record.completion, tokenizer)
    tokens = _ended(_encode(tokenizer, record.text, special=True), tokenizer)
    return Row(tuple(tokens), tuple(tokens))


def _completion_row(prompt: str, completion: str, tokenizer: PreTrainedTokenizerBase) -> Row:
    before = _encode(tokenizer, prompt, special=True)
    if before and before[-1] == tokenizer.eos_token_id:
        before = before[:-1]  # some tokenizers end every text
    together = _encode(tokenizer, prompt + completion, special=True)
    if together[: len(before)] == before:
        tokens = together
    else:
        # The boundary's characters melt into one token; at inference the prompt stands alone.
        tokens = before + _encode(tokenizer, completion, special=False)
    tokens = _ended(tokens, tokenizer)
    return Row(tuple(tokens), (IGNORED,) * len(before) + tuple(tokens[len(before) :]))


def _chat_row(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
) -> Row:
    def render(turns: Sequence[Mapping[str, Any]], *, prompt: bool = False) -> str:
        return _render(turns, tools, tokenizer, prompt=prompt)

    whole = render(messages)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        end = render(messages[: index + 1])
        start = render(messages[:index], prompt=True) if index else _opening(end, render)
        if not (whole.startswith(end) and end.startswith(start)):
            raise _UnusableError(
                f"messages[{index}]: expected a chat template that only appends turns, got one "
                "that rewrites what came before; end the row at this turn, or use "
                '"prompt" with "completion"'
            )
        spans.append((len(start), len(end)))
    encoded = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
    labels = [IGNORED] * len(tokens)
    for start_at, end_at in spans:
        inside = [
            i for i, (first, last) in enumerate(offsets) if first < end_at and last > start_at
        ]
        # What a template writes after the end-of-turn token is never generated.
        ends = [i for i in inside if tokens[i] == tokenizer.eos_token_id]
        for i in inside:
            if not ends or i <= ends[-1]:
                labels[i] = tokens[i]
    return Row(tuple(tokens), tuple(labels))


def _opening(first_turn: str, render: Callable[[Sequence[Mapping[str, Any]]], str]) -> str:
    """Return what a template writes before the text of a turn that begins a chat.

    Many templates refuse a chat of no turns, so it is what turns of other texts have, too.
    """
    others = [render([{"role": "assistant", "content": text}]) for text in "ab"]
    together = zip(first_turn, *others, strict=False)
    return "".join(letters[0] for letters in takewhile(lambda each: len(set(each)) == 1, together))


def _render(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: bool,
) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise _UnusableError(f"the chat template refuses it: {error}") from error
    return str(text)


def _require_chat(tokenizer: PreTrainedTokenizerBase) -> None:
    if not tokenizer.chat_template:
        raise LoraportError(
            'rows with "messages": expected a base with a chat template, got one without; '
            'use "prompt" with "completion", or an instruction-tuned base'
        )
    if not tokenizer.is_fast:
        raise LoraportError(
            'rows with "messages": expected a fast tokenizer (tokenizer.json), which tells where '
            'its tokens stand in the text, got a slow one; use "prompt" with "completion"'
        )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool) -> list[int]:
    tokens: list[int] = tokenizer(text, add_special_tokens=special)["input_ids"]
    return tokens


def _ended(tokens: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Append the end-of-text token where it is missing, so that the model learns to stop."""
    end = tokenizer.eos_token_id
    return tokens if end is None or tokens[-1:] == [end] else [*tokens, end]
