"""The rows of a language model's training, from JSONL files."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from loraport.base.context_length import context_length
from loraport.base.finding import resolve_base
from loraport.counts import counted
from loraport.errors import LoraportError
from loraport.training.data.batches import Row
from loraport.training.data.tokens import read_rows
from loraport.training.options import TrainOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Notes(Protocol):
    """Takes what the user should know."""

    def note(self, text: str) -> None:
        """Something the user should know happened."""


@dataclass(frozen=True)
class TextData:
    """Rows of tokens to train on and to validate with.

    Attributes:
        train: Training rows.
        validation: Held-out rows; empty if none are held out.
        truncated: Rows cut to the largest length.
        dropped: Rows left out because nothing to learn was left after the cut.
        length: Tokens of a row at most.
    """

    train: tuple[Row, ...]
    validation: tuple[Row, ...]
    truncated: int
    dropped: int
    length: int


def read_data(
    base: str,
    data: Path,
    validation: Path | None,
    tokenizer: PreTrainedTokenizerBase,
    options: TrainOptions,
    observer: Notes,
) -> TextData:
    """Read and tokenize the rows of a run; without a validation file, a share is held out.

    Args:
        base: See `loraport.base.finding.resolve_base`; its context limits the rows' length.
        data: Training rows, JSONL.
        validation: Held-out rows, JSONL.
        tokenizer: The base's.
        options: Length, share and seed are looked at.
        observer: Told of rows that were cut or left out.

    Raises:
        LoraportError: If a file cannot be read or nothing is left to train on.
    """
    length = row_length(resolve_base(base), options.max_length)
    files = {data: read_rows(data, tokenizer, length, observer.note)}
    train_rows = files[data].rows
    held_out: tuple[Row, ...] = ()
    if validation is not None:
        files[validation] = read_rows(validation, tokenizer, length, observer.note)
        held_out = files[validation].rows
    elif options.validation_share > 0:
        train_rows, held_out = split_rows(train_rows, options.validation_share, options.loop.seed)
    for path, rows in files.items():
        for text in rows.notes(path, length):
            observer.note(text)
    shared = len(set(train_rows) & set(held_out))
    if shared:
        occur = "occurs" if shared == 1 else "occur"
        observer.note(f"{counted(shared, 'validation row')} also {occur} in the training rows")
    return TextData(
        tuple(train_rows),
        tuple(held_out),
        sum(rows.truncated for rows in files.values()),
        sum(len(rows.dropped) for rows in files.values()),
        length,
    )


def row_length(directory: Path, max_length: int) -> int:
    """Return how many tokens a row has at most.

    Args:
        directory: The base, whose context limits it.
        max_length: What is asked for.
    """
    return min(max_length, context_length(directory) or max_length)


def split_rows(
    rows: Sequence[Row], share: float, seed: int
) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Split rows into training and validation, the latter at least one row.

    The rows of one chat stay together: what is validated with is not learned.

    Raises:
        LoraportError: If there is nothing left to train on.
    """
    owners = [(row.line, 0) if row.line else (0, index) for index, row in enumerate(rows)]
    whole = list(dict.fromkeys(owners))
    count = max(1, round(len(whole) * share))
    if count >= len(whole):
        raise LoraportError(
            f"the data: expected more than {counted(count, 'row')}, of which {share:g} are "
            f"held out for validation, got {len(whole)}; give more rows or --validation-share 0"
        )
    held_out = set(random.Random(f"split {seed}").sample(whole, count))
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row, owner in zip(rows, owners, strict=True):
        parts[owner in held_out].append(row)
    return tuple(parts[0]), tuple(parts[1])


def digest(rows: Sequence[Row]) -> str:
    """Return a hash of rows: of their tokens and of what counts."""
    return hashlib.sha256(repr([(row.tokens, row.labels) for row in rows]).encode()).hexdigest()


def padding_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the token that batches are padded with; it is masked, so any will do."""
    found = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((int(token) for token in found if token is not None), 0)
