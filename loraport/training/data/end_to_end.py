"""Rows laid end to end in one sequence, each blind to the others.

Nothing is padded, and what all rows of a sequence begin with (a chat template's system prompt) is
there once: its keys and values serve every row. Each row's tokens keep the positions they would
have alone and attend to the shared beginning and to their own row, so losses and gradients are
those of the padded batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from loraport.training.data.batches import IGNORED, Row, TokenBatch

_SHARED, _PADDING = 0, -1


@dataclass(frozen=True, eq=False)
class SegmentedBatch(TokenBatch):
    """A batch whose sequences hold several rows each.

    Attributes:
        positions: ``[batch, length]`` int64, each token's place in its own row.
        segments: ``[batch, length]`` int64: 0 for what all rows of the sequence share, else the
            number of the row; -1 on padding.
        bounds: ``[n + 1]`` int32, where rows and padding begin in ``[batch * length]``, and its
            end as often as makes `n` a multiple of 8; known once the batch is on its device, and
            ``None`` where rows share something.
    """

    positions: torch.Tensor | None = None
    segments: torch.Tensor | None = None
    bounds: torch.Tensor | None = None

    def to(self, device: torch.device) -> SegmentedBatch:
        """Return the batch on a device."""
        assert self.positions is not None
        assert self.segments is not None
        # Looked for once, before a GPU would have to be asked.
        bounds = _bounds(self.segments) if self.known is None else self.bounds
        return SegmentedBatch(
            tokens=self.tokens.to(device),
            mask=None,
            labels=self.labels.to(device),
            lines=self.lines,
            known=self.learned().to(device),
            row_tokens=self.row_tokens,
            positions=self.positions.to(device),
            segments=self.segments.to(device),
            bounds=None if bounds is None else bounds.to(device),
        )

    def lengthened(self, length: int, pad: int) -> SegmentedBatch:
        """Return the batch with more padding, on the right.

        Args:
            length: Of all sequences, at least what it is.
            pad: Token id to pad with.
        """
        assert self.positions is not None
        assert self.segments is not None
        more = (0, length - self.tokens.shape[1])
        return SegmentedBatch(
            F.pad(self.tokens, more, value=pad),
            None,
            F.pad(self.labels, more, value=IGNORED),
            self.lines,
            row_tokens=self.row_tokens,
            positions=F.pad(self.positions, more),
            segments=F.pad(self.segments, more, value=_PADDING),
        )

    def row_numbers(self) -> tuple[torch.Tensor, int]:
        """Return the row of every token, ``[batch, length]``, and how many rows there are.

        What is shared or padding, of which nothing is learned, has any number.
        """
        assert self.segments is not None
        each = self.segments.amax(dim=1)  # rows of each sequence: they are numbered from 1
        ends = each.cumsum(dim=0)
        return (self.segments - 1).clamp(min=0) + (ends - each)[:, None], int(ends[-1])


def _bounds(segments: torch.Tensor) -> torch.Tensor | None:
    """Return `SegmentedBatch.bounds`.

    >>> _bounds(torch.tensor([[1, 1, 2, -1], [1, 1, 1, 1]])).tolist()
    [0, 2, 3, 4, 8, 8, 8, 8, 8]
    """
    if bool((segments == _SHARED).any()):
        return None
    begins = torch.ones_like(segments, dtype=torch.bool)
    begins[:, 1:] = segments[:, 1:] != segments[:, :-1]
    starts = begins.flatten().nonzero().flatten()
    more = 1 + -starts.numel() % 8
    return F.pad(starts, (0, more), value=segments.numel()).to(torch.int32)


def attention_mask(segments: torch.Tensor) -> torch.Tensor:
    """Return which tokens attend to which, ``[batch, 1, length, length]`` bool.

    Args:
        segments: See `SegmentedBatch`.
    """
    length = segments.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    query, key = segments[:, :, None], segments[:, None, :]
    return (causal & ((query == key) | (key == _SHARED)))[:, None]


def shared_beginning(rows: Sequence[Row]) -> int:
    """Return how many tokens all rows begin with that no loss is computed from.

    The first token after them is not learned either: it is predicted from the shared part, which
    would have to predict another one for every row.

    >>> shared_beginning([Row((1, 2, 3, 4), (-100, -100, -100, 4)), Row((1, 2, 5), (-100, 2, 5))])
    0
    >>> shared_beginning([Row((1, 2, 3, 4), (-100, -100, -100, 4))] * 2)
    2
    """
    if len(rows) < 2:
        return 0
    first, last = min(row.tokens for row in rows), max(row.tokens for row in rows)
    same = zip(first, last, strict=False)  # what the extremes share, all share
    common = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], same))
    # The first label never counts: there is nothing before it to predict it from.
    learned = min(
        next(i for i, label in enumerate(row.labels) if i and label != IGNORED) for row in rows
    )
    return min(common, learned - 1)


def lay_end_to_end(
    sequences: Sequence[Sequence[Row]], pad: int, *, share: bool = True
) -> SegmentedBatch:
    """Return a batch with one sequence for each group of rows.

    Args:
        sequences: The rows of each sequence; every row has a token to learn after its first.
        pad: Token id to pad shorter sequences with.
        share: Have what all rows of a sequence begin with there once.
    """
    laid = [_sequence(rows, shared_beginning(rows) if share else 0) for rows in sequences]
    length = max(len(tokens) for tokens, _, _, _ in laid)
    fills = (pad, IGNORED, 0, _PADDING)
    tensors = []
    for part, fill in enumerate(fills):
        stacked = torch.full((len(laid), length), fill)
        for index, parts in enumerate(laid):
            stacked[index, : len(parts[part])] = torch.tensor(parts[part])
        tensors.append(stacked)
    tokens, labels, positions, segments = tensors
    lines = tuple(row.line for rows in sequences for row in rows if row.line)
    return SegmentedBatch(
        tokens,
        None,
        labels,
        lines,
        row_tokens=sum(len(row.tokens) for rows in sequences for row in rows),
        positions=positions,
        segments=segments,
    )


def _sequence(
    rows: Sequence[Row], shared: int
) -> tuple[list[int], list[int], list[int], list[int]]:
    """Return tokens, labels, positions and segments of one sequence."""
    tokens = list(rows[0].tokens[:shared])
    labels = [IGNORED] * shared
    positions = list(range(shared))
    segments = [_SHARED] * shared
    for number, row in enumerate(rows, start=1):
        tokens += row.tokens[shared:]
        # What stands before a row's first token here is not what comes before it in the row.
        labels += [IGNORED, *row.labels[shared + 1 :]]
        positions += range(shared, len(row.tokens))
        segments += [number] * (len(row.tokens) - shared)
    return tokens, labels, positions, segments
