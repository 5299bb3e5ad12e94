"""Round A and B together, so that neither leaves what a narrow dtype holds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_ROOM = 16  # elements down to this part of a matrix's largest keep all digits


def rounded_factors(
    a: torch.Tensor, b: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and B rounded once to a dtype, with the same product.

    Where one of them would leave the dtype's range, as it may in float16, a power of two, which
    rounds nothing, moves between them and makes them equally large. Numbers that are not finite,
    and matrices whose product leaves the range as well, come out as they round.

    Args:
        a: ``[r, ...]``, floating.
        b: ``[out, r, ...]``, floating, the scaling in it.
        dtype: Of both results.
    """
    import torch

    pair = a.to(dtype), b.to(dtype)
    smallest = _ROOM * torch.finfo(dtype).tiny
    if all(smallest <= _largest(tensor) < math.inf for tensor in pair):
        return pair
    size_a, size_b = _largest(a), _largest(b)
    if not 0 < size_a * size_b <= torch.finfo(dtype).max:
        return pair
    shift = 2.0 ** round((math.log2(size_b) - math.log2(size_a)) / 2)
    balanced = (a.double() * shift).to(dtype), (b.double() / shift).to(dtype)
    return max(pair, balanced, key=lesser_size)


def lesser_size(pair: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return the largest element of that matrix where it is smaller; -1 if one is not finite."""
    sizes = [_largest(tensor) for tensor in pair]
    return min(sizes) if all(math.isfinite(size) for size in sizes) else -1.0


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0
