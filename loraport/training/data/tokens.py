"""Turn records into rows of tokens, marking what the loss counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.counts import counted, counted_were
from loraport.errors import LoraportError
from loraport.training.data.batches import IGNORED, Row
from loraport.training.data.chat import UnusableError, chat_rows
from loraport.training.data.records import BadLines, Record, read_records

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EMPTY = "nothing is to be learned after the first token"
_TOLD_EVERY = 10_000  # rows, some ten seconds


@dataclass(frozen=True)
class Rows:
    """A data file as rows.

    Attributes:
        rows: What can be learned from.
        truncated: Rows that were cut to the largest length.
        dropped: Line numbers of rows left out because nothing to be learned was left of them.
        divided: Chats that are several rows each, as the chat template writes them.
        empty: Line numbers of those left out that were not cut: nothing follows their first token.
    """

    rows: tuple[Row, ...]
    truncated: int
    dropped: tuple[int, ...]
    divided: int = 0
    empty: tuple[int, ...] = ()

    def notes(self, path: Path, length: int) -> Iterator[str]:
        """Say what was cut and left out, if anything.

        Args:
            path: The file.
            length: The largest length.
        """
        if self.divided:
            chats = f"{self.divided} chats are several rows each"
            if self.divided == 1:
                chats = "1 chat is several rows"
            yield (
                f"{path}: {chats}, since the chat template "
                "writes an answer otherwise once other turns follow; each answer is learned as it "
                "is asked for"
            )
        if self.truncated:
            yield f"{path}: {counted_were(self.truncated, 'row')} cut to {length} tokens"
        cut = (Counter(self.dropped) - Counter(self.empty)).elements()
        for lines, reason in (
            (tuple(cut), f"nothing of the answer is within {length} tokens"),
            (self.empty, _EMPTY),
        ):
            if lines:
                first = tuple(dict.fromkeys(lines))
                shown = ", ".join(map(str, first[:10])) + (" ..." if first[10:] else "")
                rows = f"{counted_were(len(lines), 'row')} left out"
                place = f"line{'s' if first[1:] else ''} {shown}"
                yield f"{path}: {rows}, since {reason} ({place})"


def read_rows(
    path: Path,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    progress: Callable[[str], None] = lambda text: None,  # noqa: ARG005
) -> Rows:
    """Read a JSONL file and tokenize it.

    Args:
        path: See `loraport.training.data.records.read_records`.
        tokenizer: The base's.
        max_length: Rows are cut to this many tokens.
        progress: Told how far a long file is read.

    Raises:
        LoraportError: All bad lines at once, or no row can be used.
    """
    bad = BadLines(path)
    rows: list[Row] = []
    truncated, dropped, empty, divided = 0, [], [], 0
    records = read_records(path, bad)
    if any(record.messages for record in records):
        _require_chat(tokenizer)
    for count, record in enumerate(records):
        if count and count % _TOLD_EVERY == 0:
            progress(f"{path}: {count} of {len(records)} rows read")
        try:
            made = _rows(record, tokenizer)
        except UnusableError as error:
            bad.add(record.line, str(error))
            continue
        divided += len(made) > 1
        for row in made:
            truncated += len(row.tokens) > max_length
            cut = Row(row.tokens[:max_length], row.labels[:max_length], record.line)
            # The first token is never predicted: there is nothing before it.
            if all(label == IGNORED for label in cut.labels[1:]):
                dropped.append(record.line)
                if len(row.tokens) <= max_length:
                    empty.append(record.line)
            else:
                rows.append(cut)
    bad.raise_if_any()
    if not rows:
        far = len(dropped) - len(empty)
        cut_off = f"whose answer is cut off at {max_length} tokens"
        parts = [f"{counted(far, 'row')} {cut_off}"] * bool(far)
        parts += [f"{counted(len(empty), 'row')}, of which {_EMPTY}"] * bool(empty)
        reason = ", and ".join(parts[::-1]) or "none"
        remedy = "; raise --max-length as far as the base's context goes, or shorten them"
        raise LoraportError(f"{path}: expected rows to learn, got {reason}{remedy * bool(far)}")
    return Rows(tuple(rows), truncated, tuple(dropped), divided, tuple(empty))


def _rows(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[Row]:
    if record.messages:
        return chat_rows(record.messages, record.tools, tokenizer)
    if record.completion is not None:
        return [_completion_row(record.prompt, record.completion, tokenizer)]
    tokens = _ended(_encode(tokenizer, record.text, special=True), tokenizer)
    return [Row(tuple(tokens), tuple(tokens))]


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
