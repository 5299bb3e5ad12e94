"""Low-rank updates of several candidates at once, on rows grouped by candidate.

A batch of ``count`` candidates has ``count * b`` rows, the first ``b`` of them the first
candidate's. Candidates that stand side by side and have one rank share a stack, so that their
small products run as one batched product, without padding to the largest rank. A layer is one node
of autograd's graph for all of them, and ``W`` is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from loraport.training.lora.lora_function import product_dtype


@dataclass(eq=False)
class Stack:
    """Matrices of neighbouring candidates with one rank.

    Attributes:
        first: Number of the first candidate among the rows' groups.
        last: One more than that of the last.
        scaling: ``[n, 1, 1]``, each candidate's scaling.
        a: ``[n, r, in]``, a leaf that collects gradients.
        b: ``[n, out, r]``, a leaf that collects gradients.
        factor: The candidates' scaling, where it is one for all.
        rounded: ``a`` and ``factor * b`` in the dtype of the products, while
            `loraport.training.lora.rounded` provides them.
    """

    first: int
    last: int
    scaling: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor
    factor: float | None
    rounded: tuple[torch.Tensor, torch.Tensor] | None = None

    def to_round(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Return what is rounded, and its factor; ``None`` where there is no such factor."""
        return None if self.factor is None else (self.a, self.b, self.factor)

    @property
    def rows(self) -> slice:
        """Which groups of rows it is for."""
        return slice(self.first, self.last)

    def operands(self, dtype: torch.dtype) -> _Operands:
        """Return what is multiplied, where products are in a dtype."""
        if self.rounded is not None and self.rounded[0].dtype is dtype:
            return _Operands(self.rows, *self.rounded, None)
        return _Operands(self.rows, self.a, self.b, self.scaling)


class _Operands(NamedTuple):
    """A stack's part in a product: its groups of rows, A, B, and its scaling, if B has it not."""

    rows: slice
    a: torch.Tensor
    b: torch.Tensor
    scaling: torch.Tensor | None


def stacked_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    count: int,
    stacks: Sequence[Stack],
) -> torch.Tensor:
    """Return ``W x + bias + scaling_i B_i (A_i x)``, the base's product for all rows at once.

    Args:
        x: ``[count * b, ..., in]``.
        weight: ``[out, in]``, frozen; products are in its dtype, or in autocast's.
        bias: ``[out]``, frozen, or ``None``.
        count: Candidates in the batch.
        stacks: The candidates that have matrices here; the others get the base alone.
    """
    dtype = product_dtype(x.device.type, weight.dtype)
    operands = [stack.operands(dtype) for stack in stacks]
    with torch.autocast(x.device.type, enabled=False):
        output: torch.Tensor = _StackedLinear.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, count, operands, dtype, *_leaves(operands)
        )
    return output


def add_stacked(
    base: torch.Tensor, x: torch.Tensor, count: int, stacks: Sequence[Stack]
) -> torch.Tensor:
    """Return ``base + scaling_i B_i (A_i x)`` in the dtype of ``base``.

    For bases whose own product is not ours to write: 4-bit and 8-bit weights.

    Args:
        base: ``[count * b, ..., out]``, the base module's output.
        x: ``[count * b, ..., in]``, its input.
        count: Candidates in the batch.
        stacks: See `stacked_linear`.
    """
    operands = [stack.operands(base.dtype) for stack in stacks]
    with torch.autocast(x.device.type, enabled=False):
        output: torch.Tensor = _AddStacked.apply(  # type: ignore[no-untyped-call]
            base, x, count, operands, *_leaves(operands)
        )
    return output


def _leaves(operands: Sequence[_Operands]) -> list[torch.Tensor]:
    return [matrix for each in operands for matrix in (each.a, each.b)]


class _StackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        count: int,
        operands: Sequence[_Operands],
        dtype: torch.dtype,
        *_: torch.Tensor,
    ) -> torch.Tensor:
        groups = x.reshape(count, -1, x.shape[-1]).to(dtype)  # [count, t, in]
        y = F.linear(groups, weight.to(dtype), None if bias is None else bias.to(dtype))
        hidden = _add(y, groups, operands)
        ctx.save_for_backward(groups, weight, *_leaves(operands), *hidden)
        ctx.operands, ctx.shape, ctx.x_dtype = operands, x.shape, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        groups, weight, *rest = ctx.saved_tensors
        gradients = gradient.reshape(*groups.shape[:2], -1)  # [count, t, out]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = gradients @ weight.to(gradients.dtype)  # [count, t, in]
        found = _gradients(gradients, groups, grad_x, ctx.operands, rest)
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape).to(ctx.x_dtype)
        return (grad_x, None, None, None, None, None, *found)


class _AddStacked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        x: torch.Tensor,
        count: int,
        operands: Sequence[_Operands],
        *_: torch.Tensor,
    ) -> torch.Tensor:
        groups = x.reshape(count, -1, x.shape[-1]).to(base.dtype)  # [count, t, in]
        y = base.reshape(count, -1, base.shape[-1]).clone()
        hidden = _add(y, groups, operands)
        ctx.save_for_backward(groups, *_leaves(operands), *hidden)
        ctx.operands, ctx.shape, ctx.x_dtype = operands, x.shape, x.dtype
        return y.view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        groups, *rest = ctx.saved_tensors
        gradients = gradient.reshape(*groups.shape[:2], -1)  # [count, t, out]
        grad_x = torch.zeros_like(groups) if ctx.needs_input_grad[1] else None
        found = _gradients(gradients, groups, grad_x, ctx.operands, rest)
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape).to(ctx.x_dtype)
        return (gradient, grad_x, None, None, *found)


def _add(
    y: torch.Tensor, groups: torch.Tensor, operands: Sequence[_Operands]
) -> list[torch.Tensor]:
    """Add the updates to ``y [count, t, out]`` in place; return each stack's scaled ``A x``."""
    hidden = []
    for each in operands:
        h = torch.bmm(groups[each.rows], each.a.to(y.dtype).mT)  # [n, t, r]
        if each.scaling is not None:
            h.mul_(each.scaling)
        y[each.rows].baddbmm_(h, each.b.to(y.dtype).mT)
        hidden.append(h)
    return hidden


def _gradients(
    gradients: torch.Tensor,
    groups: torch.Tensor,
    grad_x: torch.Tensor | None,
    operands: Sequence[_Operands],
    saved: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """Return the gradients of all A and B; add those of ``x`` to ``grad_x`` in place.

    Args:
        gradients: ``[count, t, out]``.
        groups: ``[count, t, in]``, the input.
        grad_x: Of the input's shape, or ``None``.
        operands: As in the forward pass.
        saved: Every stack's A and B, then every stack's scaled ``A x``.
    """
    matrices, hidden = saved[: 2 * len(operands)], saved[2 * len(operands) :]
    found = []
    for each, a, b, h in zip(operands, matrices[::2], matrices[1::2], hidden, strict=True):
        g = gradients[each.rows]
        narrow = torch.bmm(g, b.to(g.dtype))  # [n, t, r]
        if each.scaling is not None:
            narrow.mul_(each.scaling)
        found.append(torch.bmm(narrow.mT, groups[each.rows]).to(a.dtype))  # [n, r, in]
        found.append(_gradient_of_b(g, h).to(b.dtype))
        if grad_x is not None:
            grad_x[each.rows].baddbmm_(narrow, a.to(g.dtype))
    return found


def _gradient_of_b(gradient: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Return ``[n, out, r]``.

    Args:
        gradient: ``[n, t, out]``.
        hidden: ``[n, t, r]``, the scaled ``A x``.
    """
    if gradient.is_cpu:
        # Small side first: on a CPU that takes half the time of its transpose.
        return torch.bmm(hidden.mT, gradient).mT
    return torch.bmm(gradient.mT, hidden)  # lies as B does: autograd need not copy it
