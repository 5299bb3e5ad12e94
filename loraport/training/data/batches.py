"""Rows of tokens, shuffled and padded into batches."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from loraport.training.distributed.sharing import Idle

IGNORED = -100  # the label that torch's cross entropy leaves out

# Batches sorted by length together: rows of like length share a batch, so little is padded,
# while what is in a batch still differs from epoch to epoch.
_BATCHES_SORTED = 16


@dataclass(frozen=True)
class Row:
    """One row of text as tokens.

    Attributes:
        tokens: Token ids.
        labels: The same ids where the loss counts, else `IGNORED`.
        line: Its line in the data file; 0 where it is from none.
    """

    tokens: tuple[int, ...]
    labels: tuple[int, ...]
    line: int = field(default=0, compare=False)


class Learned(NamedTuple):
    """The tokens of a batch from which a loss is computed.

    How many there are decides shapes, so a GPU that had to count would be waited for: it is done
    before a batch is moved to one.

    Attributes:
        places: ``[n]`` int64, indices into ``[batch, length - 1]`` flattened: where the next token
            counts.
        rows: ``[n]`` int64, the row that each belongs to.
        counts: How many each row has.
    """

    places: torch.Tensor
    rows: torch.Tensor
    counts: tuple[int, ...]

    def to(self, device: torch.device) -> Learned:
        """Return the same on a device."""
        return Learned(self.places.to(device), self.rows.to(device), self.counts)


@dataclass(frozen=True, eq=False)
class TokenBatch:
    """Rows padded on the right to the longest.

    Attributes:
        tokens: ``[batch, length]`` int64.
        mask: ``[batch, length]`` int64, 0 on padding; ``None`` where nothing is padded.
        labels: ``[batch, length]`` int64, `IGNORED` where the loss does not count.
        lines: The rows' lines in their data file, as far as they are known.
        known: What `learned` gives, where that is known.
        row_tokens: Tokens of its rows: what is padded does not count, and what several rows begin
            with counts for each, so it is the same however they lie and whoever shares them.
    """

    tokens: torch.Tensor
    mask: torch.Tensor | None
    labels: torch.Tensor
    lines: tuple[int, ...] = ()
    known: Learned | None = None
    row_tokens: int = 0

    def to(self, device: torch.device) -> TokenBatch:
        """Return the batch on a device."""
        mask = None if self.mask is None else self.mask.to(device)
        labels, learned = self.labels.to(device), self.learned().to(device)
        tokens = self.tokens.to(device)
        return TokenBatch(tokens, mask, labels, self.lines, learned, self.row_tokens)

    def learned(self) -> Learned:
        """Return which tokens a loss is computed from."""
        if self.known is not None:
            return self.known
        counted = self.labels[:, 1:] != IGNORED  # [batch, length - 1]
        numbers, rows = self.row_numbers()
        owners = numbers[:, 1:][counted]
        counts = torch.bincount(owners, minlength=rows).tolist()
        return Learned(counted.flatten().nonzero().flatten(), owners, tuple(counts))

    def row_numbers(self) -> tuple[torch.Tensor, int]:
        """Return the row of every token, ``[batch, length]``, and how many rows there are."""
        batch = len(self.labels)
        rows = torch.arange(batch, device=self.labels.device)[:, None]
        return rows.expand(self.labels.shape), batch


class RowBatches:
    """Batches over rows; each epoch has an order of its own that only the seed decides.

    Args:
        rows: What to batch.
        batch_size: Rows per batch; the last batch may have fewer.
        pad: Token id to pad with.
        seed: Decides the order; ``None`` keeps the rows' order sorted by length.
        part: Of each batch, every ``part[1]``-th row from ``part[0]`` on.
        layout: Makes a batch of rows and the token to pad with; `collate` where ``None``.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        pad: int,
        seed: int | None,
        part: tuple[int, int] = (0, 1),
        layout: Callable[[Sequence[Row], int], TokenBatch] | None = None,
    ) -> None:
        self._rows = rows
        self._batch_size = batch_size
        self._pad = pad
        self._seed = seed
        self._part = part
        self._layout = layout or collate

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return -(-len(self._rows) // self._batch_size)

    def share(self, rank: int, size: int) -> RowBatches:
        """Return the part of every batch that one of several processes computes."""
        return RowBatches(
            self._rows, self._batch_size, self._pad, self._seed, (rank, size), self._layout
        )

    def epoch(self, number: int) -> Iterator[TokenBatch | Idle]:
        """Return the batches of one epoch in order."""
        first, step = self._part
        for chosen in self._order(number):
            # Rows of a batch are sorted by length: every process gets short and long ones.
            mine = chosen[first::step]
            batch = self._layout([self._rows[index] for index in mine or chosen[:1]], self._pad)
            yield batch if mine else Idle(batch)

    def _order(self, epoch: int) -> list[list[int]]:
        order = list(range(len(self._rows)))
        window = len(order) or 1
        chance = None
        if self._seed is not None:
            chance = random.Random(f"{self._seed} {epoch}")
            chance.shuffle(order)
            window = self._batch_size * _BATCHES_SORTED
        batches = []
        for start in range(0, len(order), window):
            near = sorted(order[start : start + window], key=lambda i: len(self._rows[i].tokens))
            size = self._batch_size
            batches += [near[first : first + size] for first in range(0, len(near), size)]
        if chance is not None:
            chance.shuffle(batches)
        return batches


def collate(rows: Sequence[Row], pad: int) -> TokenBatch:
    """Pad rows on the right and stack them."""
    length = max(len(row.tokens) for row in rows)
    tokens = torch.full((len(rows), length), pad)
    labels = torch.full((len(rows), length), IGNORED)
    mask = torch.zeros((len(rows), length), dtype=torch.int64)
    for index, row in enumerate(rows):
        tokens[index, : len(row.tokens)] = torch.tensor(row.tokens)
        labels[index, : len(row.tokens)] = torch.tensor(row.labels)
        mask[index, : len(row.tokens)] = 1
    lines = tuple(row.line for row in rows if row.line)
    padded = mask if not bool(mask.all()) else None
    return TokenBatch(tokens, padded, labels, lines, row_tokens=int(mask.sum()))
