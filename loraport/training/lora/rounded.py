"""A and B of all layers rounded at once, where products are in a narrower dtype than they are.

A layer by itself rounds its two matrices in the forward pass and again in the backward pass,
widens two gradients and scales twice: eight operations on a few numbers. A GPU is done with each
before the next is launched, so in a small model of many layers they would take as long as the
products.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch


class Matrices(Protocol):
    """What has an A and a B: a layer, or a stack of several candidates'.

    Attributes:
        rounded: ``A`` and ``scaling * B``, while they are provided.
    """

    rounded: tuple[torch.Tensor, torch.Tensor] | None

    def to_round(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Return A, B and the scaling, if they are multiplied as they are; else ``None``."""
        ...


class RoundedMatrices:
    """``A`` and ``scaling * B`` of LoRA layers in a dtype, for one training step after the other.

    Layers whose matrices are not narrowed stay as they are.

    Args:
        layers: LoRA layers, or what else has matrices, where they are to be trained.
        dtype: Of the products.
    """

    def __init__(self, layers: Iterable[Matrices], dtype: torch.dtype) -> None:
        found = [
            (layer, parts)
            for layer in layers
            if (parts := layer.to_round()) is not None and _narrowed(parts[0].dtype, dtype)
        ]
        self._layers = [layer for layer, _ in found]
        self._scalings = [scaling for _, (_, _, scaling) in found]
        self._matrices = [a for _, (a, _, _) in found] + [b for _, (_, b, _) in found]
        self._rounded = [
            torch.empty_like(matrix, dtype=dtype, requires_grad=True) for matrix in self._matrices
        ]
        half = len(self._layers)
        self._pairs = list(zip(self._rounded[:half], self._rounded[half:], strict=True))

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
            # Not by setattr, for which a module looks through all it has: there are many layers.
            for layer, pair in zip(self._layers, self._pairs, strict=True):
                vars(layer)["rounded"] = pair
            yield
            self._hand_over()
        finally:
            for layer in self._layers:
                vars(layer)["rounded"] = None
            for rounded in self._rounded:
                rounded.grad = None

    @torch.no_grad()
    def _hand_over(self) -> None:
        """Add the gradients of what was rounded to those of the matrices themselves."""
        half = len(self._layers)
        factors = [1.0] * half + self._scalings
        there = [  # a layer that took no part has no gradient
            (matrix, rounded.grad, factor)
            for matrix, rounded, factor in zip(self._matrices, self._rounded, factors, strict=True)
            if rounded.grad is not None
        ]
        if not there:
            return
        matrices, narrow, factors = (list(part) for part in zip(*there, strict=True))
        flat = matrices[0].new_empty(sum(matrix.numel() for matrix in matrices))
        wide = list(torch._C._nn.unflatten_dense_tensors(flat, matrices))
        torch._foreach_copy_(wide, narrow)
        torch._foreach_mul_(wide, factors)
        present = [matrix.grad for matrix in matrices]
        for matrix, gradient, before in zip(matrices, wide, present, strict=True):
            if before is None:
                matrix.grad = gradient
            else:  # of an earlier part of the step, or of DoRA's norms
                before += gradient


def _narrowed(present: torch.dtype, dtype: torch.dtype) -> bool:
    return present is torch.float32 and torch.promote_types(present, dtype) is not dtype
