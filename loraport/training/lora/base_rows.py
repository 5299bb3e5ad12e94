"""A frozen base weight in slices of rows, whatever its storage."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch

from loraport.adapter import ModuleKind

if TYPE_CHECKING:
    from loraport.training.lora.lora_layer import LoraLayer

_NUMBERS = 1 << 22  # 16 MB in float32


def base_rows(layer: LoraLayer) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield slices of the base weight's outputs, a few megabytes at a time.

    Args:
        layer: The layer whose base it is; 4-bit and 8-bit weights of bitsandbytes count as what
            they stand for.

    Yields:
        Which outputs, and their rows ``[n, in]`` in the dtype of A.
    """
    weight = float_weight(layer)
    outputs, inputs = weight.shape
    step = max(1, _NUMBERS // max(1, inputs))
    for start in range(0, outputs, step):
        part = slice(start, min(start + step, outputs))
        yield part, weight[part].to(layer.lora_A.dtype)


def float_weight(layer: LoraLayer) -> torch.Tensor:
    """Return the base weight as ``[out, in]`` in a floating dtype; a view where it is stored so."""
    module: Any = layer.base_layer
    weight = cast(torch.Tensor, module.weight).detach()
    if type(module.weight).__name__ == "Params4bit":
        from bitsandbytes.functional import dequantize_4bit

        exact = copy.copy(module.weight.quant_state)
        exact.dtype = torch.float32
        weight = dequantize_4bit(weight.data, exact)
    elif type(module.weight).__name__ == "Int8Params":
        # Until the first forward pass the numbers and scales are the weight's, then the state's.
        scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
        weight = weight.float() * (scales.to(weight.device)[:, None] / 127)
    weight = weight.flatten(1)
    turned = layer.fan_in_fan_out or layer.kind is ModuleKind.EMBEDDING
    return weight.T if turned else weight
