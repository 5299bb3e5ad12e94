"""Low-rank updates of several candidates at once, on rows grouped by candidate.

A batch of ``count`` candidates has ``count * b`` rows, the first ``b`` of them the first
candidate's. Candidates that stand side by side and have one rank share a stack, so that their
small products run as one batched product, without padding to the largest rank. As in
`loraport.training.lora_function`, a layer is one node of autograd's graph, and ``W`` is frozen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from loraport.training.lora_function import product_dtype


@dataclass(frozen=True, eq=False)
class Stack:
    """Matrices of neighbouring candidates with one rank.

    Attributes:
        first: Number of the first candidate among the rows' groups.
        last: One more than that of the last.
        scaling: ``[n, 1, 1]``, each candidate's scaling.
        a: ``[n, r, in]``, a leaf that collects gradients.
        b: ``[n, out, r]``, a leaf that collects gradients.
    """

    first: int
    last: int
    scaling: torch.Tensor
    a: torch.Tensor
    b: torch.Tensor

    @property
    def rows(self) -> slice:
        """Which groups of rows it is for."""
        return slice(self.first, self.last)


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
    with torch.autocast(x.device.type, enabled=False):
        output: torch.Tensor = _StackedLinear.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, count, stacks, dtype, *_leaves(stacks)
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
    with torch.autocast(x.device.type, enabled=False):
        output: torch.Tensor = _AddStacked.apply(  # type: ignore[no-untyped-call]
            base, x, count, stacks, *_leaves(stacks)
        )
    return output


def _leaves(stacks: Sequence[Stack]) -> list[torch.Tensor]:
    return [matrix for stack in stacks for matrix in (stack.a, stack.b)]


class _StackedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        count: int,
        stacks: Sequence[Stack],
        dtype: torch.dtype,
        *_: torch.Tensor,
    ) -> torch.Tensor:
        groups = x.reshape(count, -1, x.shape[-1]).to(dtype)  # [count, t, in]
        y = F.linear(groups, weight.to(dtype), None if bias is None else bias.to(dtype))
        hidden = _add(y, groups, stacks)
        ctx.save_for_backward(groups, weight, *_leaves(stacks), *hidden)
        ctx.stacks, ctx.shape, ctx.x_dtype = stacks, x.shape, x.dtype
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        groups, weight, *rest = ctx.saved_tensors
        gradients = gradient.reshape(*groups.shape[:2], -1)  # [count, t, out]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = gradients @ weight.to(gradients.dtype)  # [count, t, in]
        found = _gradients(gradients, groups, grad_x, ctx.stacks, rest)
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
        stacks: Sequence[Stack],
        *_: torch.Tensor,
    ) -> torch.Tensor:
        groups = x.reshape(count, -1, x.shape[-1]).to(base.dtype)  # [count, t, in]
        y = base.reshape(count, -1, base.shape[-1]).clone()
        hidden = _add(y, groups, stacks)
        ctx.save_for_backward(groups, *_leaves(stacks), *hidden)
        ctx.stacks, ctx.shape, ctx.x_dtype = stacks, x.shape, x.dtype
        return y.view(base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        groups, *rest = ctx.saved_tensors
        gradients = gradient.reshape(*groups.shape[:2], -1)  # [count, t, out]
        grad_x = torch.zeros_like(groups) if ctx.needs_input_grad[1] else None
        found = _gradients(gradients, groups, grad_x, ctx.stacks, rest)
        if grad_x is not None:
            grad_x = grad_x.view(ctx.shape).to(ctx.x_dtype)
        return (gradient, grad_x, None, None, *found)


def _add(y: torch.Tensor, groups: torch.Tensor, stacks: Sequence[Stack]) -> list[torch.Tensor]:
    """Add the updates to ``y [count, t, out]`` in place; return each stack's scaled ``A x``."""
    hidden = []
    for stack in stacks:
        a, b = stack.a.to(y.dtype), stack.b.to(y.dtype)
        h = torch.bmm(groups[stack.rows], a.mT).mul_(stack.scaling)  # [n, t, r]
        y[stack.rows].baddbmm_(h, b.mT)
        hidden.append(h)
    return hidden


def _gradients(
    gradients: torch.Tensor,
    groups: torch.Tensor,
    grad_x: torch.Tensor | None,
    stacks: Sequence[Stack],
    saved: Sequence[torch.Tensor],
) -> list[torch.Tensor]:
    """Return the gradients of all A and B; add those of ``x`` to ``grad_x`` in place.

    Args:
        gradients: ``[count, t, out]``.
        groups: ``[count, t, in]``, the input.
        grad_x: Of the input's shape, or ``None``.
        stacks: As in the forward pass.
        saved: Every stack's A and B, then every stack's scaled ``A x``.
    """
    matrices, hidden = saved[: 2 * len(stacks)], saved[2 * len(stacks) :]
    found = []
    for stack, a, b, h in zip(stacks, matrices[::2], matrices[1::2], hidden, strict=True):
        g = gradients[stack.rows]
        narrow = torch.bmm(g, b.to(g.dtype)).mul_(stack.scaling)  # [n, t, r]
        found.append(torch.bmm(narrow.mT, groups[stack.rows]).to(a.dtype))  # [n, r, in]
        # Small side first: on a CPU that takes half the time of its transpose.
        found.append(torch.bmm(h.mT, g).mT.to(b.dtype))  # [n, out, r]
        if grad_x is not None:
            grad_x[stack.rows].baddbmm_(narrow, a.to(g.dtype))
    return found
