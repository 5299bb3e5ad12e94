"""A and B of all layers rounded at once, where products are in a narrower dtype than they are.

A layer by itself rounds its two matrices in the forward pass and again in the backward pass,
widens two gradients and scales twice: eight operations on a few numbers. A GPU is done with each
before the next is launched, so in a small model of many layers they would take as long as the
products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn

from loraport.training.layers import LoraLinear
from loraport.training.lora_layer import LoraLayer


class RoundedMatrices:
    """``A`` and ``scaling * B`` of LoRA layers in a dtype, for one training step after the other.

    Layers whose matrices are not narrowed stay as they are.

    Args:
        layers: LoRA layers, where they are to be trained.
        dtype: Of the products.
    """

    def __init__(self, layers: Iterable[LoraLayer], dtype: torch.dtype) -> None:
        self._layers = [
            layer for layer in layers if isinstance(layer, LoraLinear) and _narrowed(layer, dtype)
        ]
        self._scalings = [layer.scaling for layer in self._layers]
        a, b = ([getattr(layer, name) for layer in self._layers] for name in ("lora_A", "lora_B"))
        self._matrices: list[torch.Tensor] = [*a, *b]
        self._rounded = [
            torch.empty_like(matrix, dtype=dtype, requires_grad=True) for matrix in self._matrices
        ]

    @contextlib.contextmanager
    def provided(self) -> Iterator[None]:
        """Let the layers multiply with rounded matrices in one forward and backward pass.

        Gradients reach the matrices as they would without, when the context is left.
        """
        if not self._layers:
            yield
            return
        half = len(self._layers)
        with torch.no_grad():
            scaled = torch._foreach_mul(self._matrices[half:], self._scalings)
            torch._foreach_copy_(self._rounded, [*self._matrices[:half], *scaled])
            del scaled
        try:
            for layer, a, b in zip(
                self._layers, self._rounded[:half], self._rounded[half:], strict=True
            ):
                layer.rounded = (a, b)
            yield
            self._hand_over()
        finally:
            for layer in self._layers:
                layer.rounded = None
            for rounded in self._rounded:
                rounded.grad = None

    @torch.no_grad()
    def _hand_over(self) -> None:
        """Add the gradients of what was rounded to those of the matrices themselves."""
        factors = [1.0] * len(self._layers) + self._scalings
        there = [  # a layer that took no part has no gradient
            (matrix, rounded.grad, factor)
            for matrix, rounded, factor in zip(self._matrices, self._rounded, factors, strict=True)
            if rounded.grad is not None
        ]
        if not there:
            return
        matrices, narrow, factors = (list(part) for part in zip(*there, strict=True))
        sizes = [matrix.numel() for matrix in matrices]
        flat = matrices[0].new_empty(sum(sizes))
        wide = [
            part.view_as(matrix) for part, matrix in zip(flat.split(sizes), matrices, strict=True)
        ]
        torch._foreach_copy_(wide, narrow)
        torch._foreach_mul_(wide, factors)
        for matrix, gradient in zip(matrices, wide, strict=True):
            if matrix.grad is None:
                matrix.grad = gradient
            else:  # of an earlier part of the step, or of DoRA's norms
                matrix.grad += gradient


def _narrowed(layer: LoraLinear, dtype: torch.dtype) -> bool:
    return (
        layer.lora_A.dtype is torch.float32
        and torch.promote_types(torch.float32, dtype) is not dtype
        and layer.initial_A is None  # such matrices are put together first
        and not isinstance(layer.lora_dropout, nn.Dropout)
    )
