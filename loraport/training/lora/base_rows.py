"""A frozen base weight in slices of rows, whatever its storage."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn

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
    layer: Any = module
    weight = cast(torch.Tensor, layer.weight).detach()
    if type(layer.weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        exact = copy.copy(layer.weight.quant_state)
        exact.dtype = torch.float32
        weight = dequantize_4bit(weight.data, exact)
    elif type(layer.weight).__name__ == "Int8Params":
        # Until the first forward pass the numbers and scales are the weight's, then the state's.
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        weight = weight.float() * (scales.to(weight.device)[:, None] / 127)
    weight = weight.flatten(1)
    return weight.T if stored_in_out else weight
