"""How many bytes training keeps from the first step to the last: no model is loaded for it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, prod
from typing import cast

import torch
from torch import nn

from loraport.training.lora.inject import new_layers
from loraport.training.losses.output_head import output_head
from loraport.training.options import LoraOptions

_NF4_BLOCK = 64  # weights a scale
_NF4_SCALES_BLOCK = 256  # scales a scale of scales
_ADAM_MOMENTS = 2
_SMALLEST_IN_8_BITS, _MOMENTS_BLOCK = 4096, 256  # numbers


@dataclass(frozen=True)
class KeptMemory:
    """Bytes that stay for a whole run; activations and temporary buffers are not in it.

    Attributes:
        base: Frozen weights, with the scales of quantized ones.
        adapter: Trained matrices; with PiSSA or OLoRA, also those they began from.
        gradients: Gradients of what is trained.
        optimizer: AdamW's two moments of what is trained.
    """

    base: int
    adapter: int
    gradients: int
    optimizer: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.beside_steps + self.gradients

    @property
    def beside_steps(self) -> int:
        """What is there between steps: all but the gradients."""
        return self.base + self.adapter + self.optimizer


def kept_memory(
    model: nn.Module,
    options: LoraOptions,
    storage: str,
    dtype: torch.dtype,
    optimizer: str = "adamw",
) -> KeptMemory:
    """Predict the bytes that training keeps on one device.

    Args:
        model: The base without LoRA layers; one on the meta device will do. Left as it is.
        options: What is adapted.
        storage: ``"nf4"`` or ``"int8"`` for quantized linear layers (all but the output head);
            anything else for none.
        dtype: What weights that are not quantized are kept in.
        optimizer: What `LoopOptions` has.

    Raises:
        LoraportError: If the options select no modules, or some that cannot be adapted.
    """
    # Shapes are all that counts, and there may be no weights to begin A from.
    layers = new_layers(model, replace(options, init="kaiming")).values()
    parameters = [p for layer in layers for p in layer.parameters(recurse=False)]
    trained = sum(_bytes(parameter) for parameter in parameters)
    start = 0
    if options.init in ("pissa", "olora"):
        start = sum(_bytes(layer.lora_A) + _bytes(layer.lora_B) for layer in layers)
    return KeptMemory(
        base=base_bytes(model, storage, dtype),
        adapter=trained + start,
        gradients=trained,
        optimizer=sum(moments_bytes(p.numel(), optimizer) for p in parameters),
    )


def base_bytes(model: nn.Module, storage: str, dtype: torch.dtype) -> int:
    """Return the bytes of a frozen base; weights that modules share count once.

    Args:
        model: See `kept_memory`.
        storage: See `kept_memory`.
        dtype: See `kept_memory`.
    """
    head = output_head(model)
    quantized = {
        id(module.weight)
        for module in model.modules()
        if storage in ("nf4", "int8") and type(module) is nn.Linear and module is not head
    }
    return sum(
        quantized_bytes(cast(tuple[int, int], tuple(parameter.shape)), storage)
        if id(parameter) in quantized
        else parameter.numel() * dtype.itemsize
        for parameter in model.parameters()
    )


def moments_bytes(count: int, optimizer: str) -> int:
    """Return the bytes of AdamW's two moments of ``count`` numbers.

    In 8 bits, a float32 scales 256 of them, and few numbers stay in float32 (bitsandbytes).
    """
    if optimizer == "adamw" or count < _SMALLEST_IN_8_BITS:
        return _ADAM_MOMENTS * 4 * count
    return _ADAM_MOMENTS * (count + 4 * ceil(count / _MOMENTS_BLOCK))


def quantized_bytes(shape: tuple[int, int], storage: str) -> int:
    """Return the bytes of one quantized weight ``[out, in]`` with its scales.

    NF4 has a byte for two weights, a byte of scale for 64 weights and a float32 for 256 scales
    (Dettmers et al. 2023, QLoRA, arXiv:2305.14314); its code tables, about 1 KB, are left out.
    int8 has a byte a weight and a float32 a row (LLM.int8(), arXiv:2208.07339).
    """
    count = prod(shape)
    if storage == "int8":
        return count + 4 * shape[0]
    scales = ceil(count / _NF4_BLOCK)
    return ceil(count / 2) + scales + 4 * ceil(scales / _NF4_SCALES_BLOCK)


def _bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()
