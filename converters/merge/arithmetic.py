"""The arithmetic of a merge, float64 throughout; `rounding` rounds it once at the end.

A stored weight is seen as a matrix ``[rows, columns]`` and worked on in blocks of rows, so
memory does not grow with the size of the weight.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class Change:
    """What one adapter does to a stored matrix ``W`` ``[rows, columns]``, or to some of its rows.

    The adapter alone would make it ``W' = gain * (N + scaling * left right)``, where ``N`` is
    the replacement or else ``W``, and the gain is ``magnitude / ||.||`` (DoRA). The change is
    ``strength * (W' - W)``; those of several adapters add up.

    Attributes:
        strength: Factor on the change.
        left: ``[rows, r]`` or ``None``.
        right: ``[r, columns]`` or ``None``.
        scaling: Factor on ``left right``.
        replacement: ``[rows, columns]``, or ``[n, columns]`` for the rows in ``token_rows``.
        token_rows: Rows that ``replacement`` holds, or ``None`` for all.
        magnitude: DoRA's, ``[rows]``, or ``[columns]`` where ``transposed``.
        transposed: The matrix is stored ``[in, out]``.
        first_row: Where the rows of this change begin in the stored matrix.
    """

    strength: float
    left: torch.Tensor | None = None
    right: torch.Tensor | None = None
    scaling: float = 1.0
    replacement: torch.Tensor | None = None
    token_rows: tuple[int, ...] | None = None
    magnitude: torch.Tensor | None = None
    transposed: bool = False
    first_row: int = 0

    @property
    def adds(self) -> bool:
        """Whether the change is a plain sum, whatever ``W`` holds."""
        return self.replacement is None and self.magnitude is None

    def rows(self, total: int) -> tuple[int, int]:
        """Return the first of its rows in a matrix of ``total`` rows, and one past the last."""
        given = self.left if self.left is not None else self.replacement
        if given is None or self.token_rows is not None:
            return 0, total
        return self.first_row, self.first_row + int(given.shape[0])


@dataclass(frozen=True, eq=False)
class PreparedChange:
    """A change with its factors in float64.

    Attributes:
        change: What it was made from.
        left: ``[rows, r]`` with scaling folded in, and the strength where the change adds.
        right: ``[r, columns]``.
        norm: ``[columns]``, the norms of ``N + scaling left right`` where stored transposed.
    """

    change: Change
    left: torch.Tensor | None
    right: torch.Tensor | None
    norm: torch.Tensor | None = None


def prepare(change: Change) -> PreparedChange:
    """Return the change with its factors in float64 and the scaling folded in."""
    if change.left is None or change.right is None:
        return PreparedChange(change, None, None)
    factor = change.scaling * (change.strength if change.adds else 1.0)
    return PreparedChange(change, change.left.double() * factor, change.right.double().contiguous())


def merged_rows(
    weight: torch.Tensor, first: int, total: int, changes: Sequence[PreparedChange]
) -> torch.Tensor:
    """Return the merged rows ``first : first + n`` of a matrix; see `merge_rows_`."""
    return merge_rows_(weight.clone(), first, total, changes)


def merge_rows_(
    weight: torch.Tensor, first: int, total: int, changes: Sequence[PreparedChange]
) -> torch.Tensor:
    """Merge changes into the rows ``first : first + n`` of a matrix, in place.

    Args:
        weight: Those rows of the base, ``[n, columns]``, float64; overwritten.
        first: Number of the first one.
        total: Rows of the whole matrix.
        changes: All changes to the matrix.

    Returns:
        ``weight``.
    """
    result = weight
    if not all(prepared.change.adds for prepared in changes):
        weight = weight.clone()  # the others are relative to the base's values
    last = first + result.shape[0]
    for prepared in changes:
        start, stop = prepared.change.rows(total)
        begin, end = max(start, first), min(stop, last)
        if begin >= end:
            continue
        own = slice(begin - start, end - start)
        part = result[begin - first : end - first]
        if prepared.change.adds:
            if prepared.left is not None and prepared.right is not None:
                part.addmm_(prepared.left[own], prepared.right)
        elif prepared.change.token_rows is not None:
            _add_token_rows(part, weight, first, prepared.change)
        else:
            alone = adapted_rows(weight[begin - first : end - first], own, prepared)
            if prepared.change.strength == 1.0 and len(changes) == 1:
                part.copy_(alone)
            else:
                base = weight[begin - first : end - first]
                part.add_((alone - base) * prepared.change.strength)
    return result


def adapted_rows(weight: torch.Tensor, own: slice, prepared: PreparedChange) -> torch.Tensor:
    """Return the rows ``own`` of ``W' = gain * (N + scaling * left right)``, float64."""
    result = ungained_rows(weight, own, prepared)
    magnitude = prepared.change.magnitude
    if magnitude is None:
        return result
    magnitude = magnitude.double().flatten()
    if prepared.norm is not None:
        return result.mul_(magnitude / prepared.norm)
    return result.mul_((magnitude[own] / result.norm(dim=1))[:, None])


def ungained_rows(weight: torch.Tensor, own: slice, prepared: PreparedChange) -> torch.Tensor:
    """Return the rows ``own`` of ``N + scaling * left right``, float64."""
    replacement = prepared.change.replacement
    result = weight.clone() if replacement is None else replacement[own].double()
    if prepared.left is not None and prepared.right is not None:
        result.addmm_(prepared.left[own], prepared.right)
    return result


def _add_token_rows(part: torch.Tensor, weight: torch.Tensor, first: int, change: Change) -> None:
    assert change.token_rows is not None
    assert change.replacement is not None
    for number, row in enumerate(change.token_rows):
        if first <= row < first + part.shape[0]:
            new, base = change.replacement[number].double(), weight[row - first]
            if change.strength == 1.0 and part[row - first].equal(base):
                part[row - first] = new
            else:
                part[row - first] += change.strength * (new - base)
