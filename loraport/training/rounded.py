"""A and B of all layers rounded at once, where products are in a narrower dtype than they are.

A layer by itself rounds its two matrices in the forward pass and again in the backward pass,
widens two gradients and scales twice: eight operations on a few numbers. A GPU is done with each
before the next is launched, so in a small model of many layers they would take as long as the
products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from loraport.training.layers import LoraLinear
from loraport.training.lora_layer import LoraLayer


@contextlib.contextmanager
def rounded_matrices(layers: Iterable[LoraLayer], dtype: torch.dtype) -> Iterator[None]:
    """Let layers multiply with ``A`` and ``scaling * B`` in a dtype, all made at once.

    Gradients reach the matrices as they would without. For one forward and backward pass: the
    values are those of when it began.

    Args:
        layers: LoRA layers; those whose matrices are not narrowed stay as they are.
        dtype: Of the products.
    """
    chosen = [
        layer for layer in layers if isinstance(layer, LoraLinear) and _narrowed(layer, dtype)
    ]
    if not chosen:
        yield
        return
    a, b = ([getattr(layer, name) for layer in chosen] for name in ("lora_A", "lora_B"))
    scalings = [layer.scaling for layer in chosen]
    made = _Rounded.apply(dtype, scalings, *a, *b)  # type: ignore[no-untyped-call]
    try:
        for index, layer in enumerate(chosen):
            layer.rounded = (made[index], made[index + len(chosen)])
        yield
    finally:
        for layer in chosen:
            layer.rounded = None


def _narrowed(layer: LoraLinear, dtype: torch.dtype) -> bool:
    return (
        torch.promote_types(layer.lora_A.dtype, dtype) is not dtype
        and layer.initial_A is None  # such matrices are put together first
        and not isinstance(layer.lora_dropout, nn.Dropout)
    )


class _Rounded(torch.autograd.Function):
    """From every ``A`` and every ``B`` to those in a dtype, ``B`` scaled before it is rounded."""

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, scalings: list[float], *matrices: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        ctx.scalings, ctx.dtypes = scalings, [matrix.dtype for matrix in matrices]
        ctx.set_materialize_grads(False)  # a layer that took no part gets no gradient
        made = [torch.empty_like(matrix, dtype=dtype) for matrix in matrices]
        scaled = torch._foreach_mul(matrices[len(scalings) :], scalings)
        torch._foreach_copy_(made, [*matrices[: len(scalings)], *scaled])
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        factors = [1.0] * len(ctx.scalings) + ctx.scalings
        there = [index for index, gradient in enumerate(gradients) if gradient is not None]
        found = [gradient for gradient in gradients if gradient is not None]
        wide = [
            torch.empty_like(gradient, dtype=ctx.dtypes[index])
            for index, gradient in zip(there, found, strict=True)
        ]
        if wide:
            torch._foreach_copy_(wide, found)
            torch._foreach_mul_(wide, [factors[index] for index in there])
        by_index = dict(zip(there, wide, strict=True))
        return None, None, *(by_index.get(index) for index in range(len(gradients)))
