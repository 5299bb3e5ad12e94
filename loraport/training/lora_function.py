"""``y = W x + b + scaling * B (A x)`` as one node of autograd's graph.

Written with torch's own operations, the sum keeps its parts: a product ``[tokens, out]`` that is
only added, its scaled copy, and in the backward pass two gradients ``[tokens, in]`` that are added
too. Here the narrow products go straight into the wide result (``addmm_``), the input is kept
once, in the dtype of the product, and what is kept besides is ``A x`` with ``rank`` numbers a
token. ``W`` is frozen: it gets no gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Return ``W x + bias + scaling * B (A x)``.

    All products are in the dtype of ``W`` (of autocast, where it is on), so that a bfloat16 base
    needs no float32 copy of its activations; the gradients of A and B are in their own dtype.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``, frozen, any floating dtype.
        bias: ``[out]``, frozen, or ``None``.
        a: ``[r, in]``.
        b: ``[out, r]``.
        scaling: Of the update.
    """
    dtype = product_dtype(x.device.type, weight.dtype)
    with torch.autocast(x.device.type, enabled=False):
        if _records_gradient(x, a, b):
            fused: torch.Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
                x, weight, bias, a, b, scaling, dtype
            )
            return fused
        x = x.to(dtype)
        base = F.linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
        hidden = F.linear(x, a.to(dtype)) * scaling
        return base + F.linear(hidden, b.to(dtype))


def add_low_rank(
    base: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Return ``base + scaling * B (A x)`` in the dtype of ``base``.

    For bases whose own product is not ours to write: 4-bit and 8-bit weights.

    Args:
        base: ``[..., out]``, the base module's output.
        x: ``[..., in]``.
        a: ``[r, in]``.
        b: ``[out, r]``.
        scaling: Of the update.
    """
    dtype = base.dtype
    with torch.autocast(x.device.type, enabled=False):
        if _records_gradient(x, a, b):
            fused: torch.Tensor = _AddLowRank.apply(  # type: ignore[no-untyped-call]
                base, x, a, b, scaling
            )
            return fused
        hidden = F.linear(x.to(dtype), a.to(dtype)) * scaling
        return base + F.linear(hidden, b.to(dtype))


def product_dtype(device: str, weight: torch.dtype) -> torch.dtype:
    """Return the dtype of products with a weight: autocast's where it is on, else the weight's."""
    # Autocast leaves float64 alone.
    if torch.is_autocast_enabled(device) and weight is not torch.float64:
        return torch.get_autocast_dtype(device)
    return weight


def _records_gradient(*tensors: torch.Tensor) -> bool:
    # A compiler or exporter sees more in plain operations than in a node of our own.
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and any(tensor.requires_grad for tensor in tensors)
    )


class _LoraLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        ctx.scaling, ctx.shape, ctx.x_dtype = scaling, x.shape, x.dtype
        rows = x.reshape(-1, x.shape[-1]).to(dtype)  # [n, in]
        hidden = _scaled(F.linear(rows, a.to(dtype)), scaling)  # [n, r]
        y = F.linear(rows, weight.to(dtype), None if bias is None else bias.to(dtype))  # [n, out]
        y.addmm_(hidden, b.to(dtype).T)
        ctx.save_for_backward(rows, hidden, weight, a, b)
        return _shaped(y, (*x.shape[:-1], y.shape[-1]))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, hidden, weight, a, b = ctx.saved_tensors
        gradient = gradient.reshape(-1, gradient.shape[-1])  # [n, out]
        narrow, grad_a, grad_b = _low_rank_gradients(
            gradient, rows, hidden, a, b, ctx.scaling, ctx.needs_input_grad[3:5]
        )
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = gradient @ weight.to(gradient.dtype)  # [n, in]
            grad_x.addmm_(narrow, a.to(gradient.dtype))
            grad_x = grad_x.view(ctx.shape).to(ctx.x_dtype)
        return grad_x, None, None, grad_a, grad_b, None, None


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        base: torch.Tensor,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
    ) -> torch.Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(base.dtype)  # [n, in]
        hidden = _scaled(F.linear(rows, a.to(base.dtype)), scaling)  # [n, r]
        y = torch.addmm(base.reshape(-1, base.shape[-1]), hidden, b.to(base.dtype).T)
        ctx.save_for_backward(rows, hidden, a, b)
        ctx.scaling, ctx.shape, ctx.x_dtype = scaling, x.shape, x.dtype
        return _shaped(y, base.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        rows, hidden, a, b = ctx.saved_tensors
        flat = gradient.reshape(-1, gradient.shape[-1])  # [n, out]
        narrow, grad_a, grad_b = _low_rank_gradients(
            flat, rows, hidden, a, b, ctx.scaling, ctx.needs_input_grad[2:4]
        )
        grad_x = None
        if ctx.needs_input_grad[1]:
            grad_x = (narrow @ a.to(flat.dtype)).view(ctx.shape).to(ctx.x_dtype)
        return gradient, grad_x, grad_a, grad_b, None


def _shaped(result: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """Return a result that nothing else holds in another shape.

    Not as a view: autograd lets a model change in place what a node returns, but no view of it.
    """
    shaped: torch.Tensor = torch.ops.aten._unsafe_view.default(result, list(shape))
    return shaped


def _scaled(narrow: torch.Tensor, scaling: float) -> torch.Tensor:
    """Scale in place; nothing to do where B was scaled already."""
    return narrow if scaling == 1.0 else narrow.mul_(scaling)


def _low_rank_gradients(
    gradient: torch.Tensor,
    rows: torch.Tensor,
    hidden: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
    needed: tuple[bool, bool],
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return the gradient of ``A x`` and those of A and B.

    Args:
        gradient: ``[n, out]``.
        rows: ``[n, in]``, the input.
        hidden: ``[n, r]``, ``scaling * A x``.
        a: ``[r, in]``.
        b: ``[out, r]``.
        scaling: Of the update.
        needed: Whether A and B want theirs.
    """
    narrow = _scaled(gradient @ b.to(gradient.dtype), scaling)  # [n, r]
    grad_a = (narrow.T @ rows).to(a.dtype) if needed[0] else None
    grad_b = None
    if needed[1] and gradient.is_cpu:
        # Small side first: [r, n] @ [n, out] takes half the time of its transpose on a CPU.
        grad_b = (hidden.T @ gradient).T.to(b.dtype)
    elif needed[1]:
        grad_b = (gradient.T @ hidden).to(b.dtype)  # lies as B does: autograd need not copy it
    return narrow, grad_a, grad_b
