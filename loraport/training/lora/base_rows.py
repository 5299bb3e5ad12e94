"""A frozen base weight in slices of rows, whatever its storage."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from loraport.base.bitsandbytes_weights import dequantized_weight

_NUMBERS = 1 << 22  # 16 MB in float32


def base_rows(weight: torch.Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield slices of a weight's rows, a few megabytes at a time.

    Args:
        weight: ``[out, in]``, as `float_weight` gives it.
        dtype: Of the slices.

    Yields:
        Which outputs, and their rows ``[n, in]``.
    """
    outputs, inputs = weight.shape
    step = max(1, _NUMBERS // max(1, inputs))
    for start in range(0, outputs, step):
        part = slice(start, min(start + step, outputs))
        yield part, weight[part].to(dtype)


def float_weight(module: nn.Module, *, stored_in_out: bool) -> torch.Tensor:
    """Return a module's weight as ``[out, in]`` in a floating dtype; a view where it is stored so.

    Args:
        module: Of the base; 4-bit and 8-bit weights of bitsandbytes count as what they stand for.
        stored_in_out: Whether it is stored transposed.
    """
    weight = dequantized_weight(module).flatten(1)
    return weight.T if stored_in_out else weight
