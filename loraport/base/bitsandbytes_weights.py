"""Weights of bitsandbytes' layers, as the floats that they stand for."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


def dequantized_weight(module: nn.Module) -> torch.Tensor:
    """Return a module's weight: float32 from 4-bit and 8-bit ones, any other as it is."""
    import torch

    layer: Any = module
    weight: torch.Tensor = layer.weight.detach()
    if type(layer.weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        exact = copy.copy(layer.weight.quant_state)
        exact.dtype = torch.float32
        weight = dequantize_4bit(weight.data, exact)
    elif type(layer.weight).__name__ == "Int8Params":
        # Until the first forward pass the numbers and scales are the weight's, then the state's.
        scales = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
        weight = weight.float() * (scales.to(weight.device)[:, None] / 127)
    return weight
