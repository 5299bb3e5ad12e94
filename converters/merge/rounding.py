"""Rounding float64 to a weight's dtype: once, to nearest with ties to even."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch

_STRETCH = 1 << 15  # elements looked at together: their temporaries stay in a core's cache


def round_once(exact: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return float64 values rounded to a dtype in one step.

    Args:
        exact: float64, any shape.
        dtype: A floating dtype of at least 16 bits.
    """
    import torch

    single = torch.empty(exact.shape, dtype=torch.float32)
    return round_into(exact, single, torch.empty(exact.shape, dtype=dtype))


def round_into(exact: torch.Tensor, single: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """Fill ``rounded`` with float64 values rounded to its dtype in one step, and return it.

    torch converts float64 to bfloat16 and float16 by way of float32. That rounds twice, and
    wrongly where the first rounding lands on a tie of the second; those elements are nudged
    off the tie to the side where the exact value lies.

    Args:
        exact: float64, any shape, contiguous.
        single: float32, the same shape, contiguous; its values are overwritten.
        rounded: A floating dtype of at least 16 bits, or int64 for what is whole; the same shape,
            contiguous.
    """
    import torch

    if rounded.dtype in (torch.float32, torch.float64, torch.int64):
        return rounded.copy_(exact)
    flat_exact, flat = exact.view(-1), single.copy_(exact).view(-1)
    ties = _bfloat16_ties if rounded.dtype == torch.bfloat16 else _float16_ties
    for found in ties(flat):
        where = torch.from_numpy(found)
        wanted, got = flat_exact[where], flat[where]
        side = torch.sign(wanted - got.double()).float() * torch.inf
        flat[where] = torch.where(wanted == got, got, torch.nextafter(got, side))
    return rounded.copy_(single)


def _bfloat16_ties(flat: torch.Tensor) -> Iterator[np.ndarray]:
    """Yield the numbers of float32 elements that may lie half-way between two bfloat16."""
    import numpy as np
    import torch

    # numpy compares contiguous integers several times as fast as torch does. Of the halves of
    # each element one is the lower: in it a tie shows as its highest bit alone.
    halves = flat.view(torch.int16).numpy()
    lower = 0 if np.little_endian else 1
    for start in range(0, halves.size, 2 * _STRETCH):
        found = np.flatnonzero(halves[start : start + 2 * _STRETCH] == -0x8000)
        found = found[found % 2 == lower]
        if found.size:
            yield (found + start) // 2


def _float16_ties(flat: torch.Tensor) -> Iterator[np.ndarray]:
    """Yield the numbers of float32 elements that may lie half-way between two float16."""
    import numpy as np
    import torch

    bits = flat.view(torch.int32).numpy()
    smallest_normal = 0x38800000  # 2^-14 as float32; below it, ties lie elsewhere: take them all
    for start in range(0, bits.size, _STRETCH):
        part = bits[start : start + _STRETCH]
        tie = (part & 0x1FFF) == 0x1000
        found = np.flatnonzero(tie | ((part & 0x7FFFFFFF) < smallest_normal))
        if found.size:
            yield found + start
