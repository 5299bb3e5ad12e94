"""How the rows of a batch lie in memory: padded, end to end, or packed to a fixed length."""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from torch import nn

from loraport.errors import LoraportError
from loraport.training.data.batches import Row, RowBatches, TokenBatch, collate
from loraport.training.data.end_to_end import SegmentedBatch, lay_end_to_end, shared_beginning
from loraport.training.data.model_inputs import attends_within_rows, shortcuts
from loraport.training.distributed.sharing import Idle

Packing = Literal["auto", "fill", "none"]
Layout = Callable[[Sequence[Row], int], TokenBatch]

LENGTHS = 16
_ALIGNED = 8  # tokens: what matrix units take at once


def make_batches(
    model: nn.Module,
    rows: Sequence[Row],
    batch_size: int,
    pad: int,
    seed: int | None,
    *,
    packing: Packing,
    max_length: int,
    few_lengths: bool = False,
) -> RowBatches | PackedBatches:
    """Return batches of rows in the layout asked for.

    Args:
        model: The model they are for; it decides what layouts are right.
        rows: What to batch.
        batch_size: Rows per batch; for ``fill``, sequences per batch.
        pad: Token id to pad with.
        seed: Decides the order; ``None`` keeps the rows sorted by length.
        packing: ``none`` pads, ``auto`` lays a batch's rows end to end where that is less work,
            ``fill`` packs rows into sequences of up to ``max_length`` tokens.
        max_length: Tokens of a packed sequence.
        few_lengths: Pad batches further, to at most `LENGTHS` lengths of each layout, for what is
            prepared once for a shape.

    Raises:
        LoraportError: If rows are to be packed that the model would mix.
    """
    if packing == "none" and not few_lengths:
        return RowBatches(rows, batch_size, pad, seed)
    able = shortcuts(model)
    longest = max(len(row.tokens) for row in rows)
    if few_lengths and (reason := why_not_few_lengths(model, longest)):
        raise LoraportError(f"--cuda-graphs: {reason}; use --no-cuda-graphs")
    if packing == "fill":
        if not able.rows_apart or able.longest < max_length:
            reason = (
                f"its attention window is {able.longest} tokens, set --max-length to that"
                if able.rows_apart
                else "in a trial, packed rows did not give what they give alone"
            )
            raise LoraportError(
                f"packing: expected a model that keeps packed rows apart, got "
                f"{type(model).__name__}: {reason}, or use --packing none"
            )
        return PackedBatches(rows, batch_size, pad, seed, max_length, few_lengths=few_lengths)
    width = getattr(getattr(model, "config", None), "hidden_size", None) or 1024
    layout: Layout = collate
    if packing == "none":
        layout = side_by_side
    elif attends_within_rows(model):
        layout = cheapest_within_rows(width)
    elif able.rows_apart:
        layout = cheapest_layout(width, able.longest, side_by_side if few_lengths else collate)
    if few_lengths:
        layout = in_few_lengths(layout, longest, batch_size)
    return RowBatches(rows, batch_size, pad, seed, layout=layout)


def why_not_few_lengths(model: nn.Module, longest: int) -> str | None:
    """Return why a model's batches cannot be padded to few lengths.

    Args:
        model: A transformers causal language model.
        longest: Tokens of a row at most.
    """
    able = shortcuts(model)
    if able.rows_apart and able.longest >= longest:
        return None
    got = (
        f"one whose attention window is {able.longest} tokens, and a row of {longest}"
        if able.rows_apart
        else type(model).__name__
    )
    return f"expected a model that keeps rows apart given a mask, got {got}"


def side_by_side(rows: Sequence[Row], pad: int) -> TokenBatch:
    """Return padded rows that say themselves where they end, whatever a model makes of padding."""
    return lay_end_to_end([[row] for row in rows], pad)


def in_few_lengths(layout: Layout, longest: int, batch_size: int) -> Layout:
    """Return a layout whose batches are padded further, so that many have the same shape.

    Lengths are multiples of a part of the largest, not powers: padding then costs the same few
    tokens at any length, and never more than a part of the longest batch.

    Args:
        layout: Makes the batches, whose sequences say where rows end.
        longest: Tokens of the longest row.
        batch_size: Rows of a batch at most.
    """

    def laid(rows: Sequence[Row], pad: int) -> TokenBatch:
        batch = layout(rows, pad)
        assert isinstance(batch, SegmentedBatch)
        sequences, length = batch.tokens.shape
        largest = longest * batch_size if sequences == 1 else longest
        return batch.lengthened(_next_of_few(length, largest), pad)

    return laid


def _next_of_few(length: int, largest: int) -> int:
    """Return the smallest of few lengths that is enough.

    >>> [_next_of_few(length, 4000) for length in (1, 257, 4000)]
    [256, 512, 4096]
    """
    step = -(-largest // LENGTHS)
    step = -(-step // _ALIGNED) * _ALIGNED
    return -(-length // step) * step


def cheapest_layout(width: int, longest: int, padded: Layout = collate) -> Layout:
    """Return a layout that pads, or lays rows end to end where that is less work.

    A token passes some 12 width² weights a layer, a pair of tokens that attention looks at costs
    2 width: as much work as ``1 / (6 width)`` of a token. End to end, every pair of the sequence
    is computed, in a padded batch only those up to the diagonal.

    Args:
        width: Numbers in a hidden state.
        longest: Tokens of a sequence up to which the model keeps rows apart.
        padded: Pads them.
    """

    def layout(rows: Sequence[Row], pad: int) -> TokenBatch:
        lengths = [len(row.tokens) for row in rows]
        shared = shared_beginning(rows)
        total = sum(lengths) - shared * (len(rows) - 1)
        numbers, length = len(rows) * max(lengths), max(lengths)
        work_end_to_end = total + total**2 / (6 * width)
        work_padded = numbers + numbers * length / (12 * width)
        if len(rows) > 1 and total <= longest and work_end_to_end < work_padded:
            return lay_end_to_end([rows], pad)
        return padded(rows, pad)

    return layout


def cheapest_within_rows(width: int) -> Layout:
    """Return a layout that lays rows end to end, for a model that attends within rows.

    A beginning that all rows share is there once where that is less work although it takes a mask,
    and with it all pairs of the sequence. On a GPU a pair costs about as much as ``1 / width`` of
    a token: measured on an H200 (bfloat16, width 2048), where attention computes at a quarter of
    the rate of other products.

    Args:
        width: Numbers in a hidden state.
    """

    def layout(rows: Sequence[Row], pad: int) -> TokenBatch:
        lengths = [len(row.tokens) for row in rows]
        total = sum(lengths) - shared_beginning(rows) * (len(rows) - 1)
        work_shared = total + total**2 / width
        work_apart = sum(lengths) + sum(length**2 for length in lengths) / (2 * width)
        return lay_end_to_end([rows], pad, share=work_shared < work_apart)

    return layout


class PackedBatches:
    """Batches of sequences into which rows are packed, the fullest way that is found.

    Rows of a sequence do not see each other, so which rows share one changes nothing: they are
    packed once, and epochs shuffle the sequences.

    Args:
        rows: What to pack, each of at most ``length`` tokens.
        batch_size: Sequences per batch; the last batch may have fewer.
        pad: Token id to pad with.
        seed: Decides the order; ``None`` keeps it.
        length: Tokens of a sequence at most.
        part: Of each batch, every ``part[1]``-th sequence from ``part[0]`` on.
        few_lengths: See `make_batches`.
    """

    def __init__(
        self,
        rows: Sequence[Row],
        batch_size: int,
        pad: int,
        seed: int | None,
        length: int,
        part: tuple[int, int] = (0, 1),
        *,
        few_lengths: bool = False,
    ) -> None:
        self._rows = rows
        self._batch_size = batch_size
        self._pad = pad
        self._seed = seed
        self._length = length
        self._part = part
        self._few_lengths = few_lengths
        shared = shared_beginning(rows)
        sizes = [len(row.tokens) - shared for row in rows]
        self._sequences = pack_by_size(sizes, length - shared)

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return -(-len(self._sequences) // self._batch_size)

    def share(self, rank: int, size: int) -> PackedBatches:
        """Return the part of every batch that one of several processes computes."""
        return PackedBatches(
            self._rows,
            self._batch_size,
            self._pad,
            self._seed,
            self._length,
            (rank, size),
            few_lengths=self._few_lengths,
        )

    def epoch(self, number: int) -> Iterator[TokenBatch | Idle]:
        """Return the batches of one epoch in order."""
        order = list(range(len(self._sequences)))
        if self._seed is not None:
            random.Random(f"{self._seed} {number}").shuffle(order)
        first, step = self._part
        for start in range(0, len(order), self._batch_size):
            chosen = order[start : start + self._batch_size]
            mine = chosen[first::step]
            sequences = [
                [self._rows[index] for index in self._sequences[i]] for i in mine or chosen[:1]
            ]
            batch = lay_end_to_end(sequences, self._pad)
            if self._few_lengths:
                length = _next_of_few(batch.tokens.shape[1], self._length)
                batch = batch.lengthened(length, self._pad)
            yield batch if mine else Idle(batch)


def pack_by_size(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Return indices grouped so that the sizes of a group sum to at most the capacity.

    The largest first, each into the fullest group that still takes it (best fit decreasing).

    >>> pack_by_size([5, 3, 7, 2, 3], 10)
    [[2, 1], [0, 4, 3]]
    """
    groups: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, group), sorted
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        place = bisect.bisect_left(free, (sizes[index], -1))
        if place == len(free):
            room, group = capacity, len(groups)
            groups.append([])
        else:
            room, group = free.pop(place)
        groups[group].append(index)
        bisect.insort(free, (room - sizes[index], group))
    return groups
