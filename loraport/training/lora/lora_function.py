"""``y = W x + b + scaling * B (A x)``, and what autograd makes of it.

The narrow product goes straight into the wide one (``addmm_``), in the dtype of that: no sum keeps
its parts, a bfloat16 base needs no float32 copy of its activations, and what is kept for the
backward pass is the input, once, and ``A x`` with ``rank`` numbers a token. ``W`` is frozen: it
gets no gradient.

Every layer comes by here in every step, and in a small model a GPU is done before the next
operation is there. So these are torch's own operations on matrices, whose backward pass is not
written in Python, and none is called that would do nothing.
"""

from __future__ import annotations

import torch


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Return ``W x + bias + scaling * B (A x)``.

    All products are in the dtype of ``W`` (of autocast, where it is on); the gradients of A and B
    are in their own.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``, frozen, any floating dtype.
        bias: ``[out]``, frozen, or ``None``.
        a: ``[r, in]``.
        b: ``[out, r]``.
        scaling: Of the update.
    """
    dtype = product_dtype(x.device.type, weight.dtype)
    if _autocast_to_another(dtype, x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return lora_linear(x, weight, bias, a, b, scaling)
    rows = _in(dtype, x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))  # [n, in]
    if bias is None:
        y = rows.mm(_in(dtype, weight).t())  # [n, out]
    else:
        y = torch.addmm(_in(dtype, bias), rows, _in(dtype, weight).t())
    hidden = rows.mm(_in(dtype, a).t())  # [n, r]
    y.addmm_(hidden, _in(dtype, b).t(), alpha=scaling)
    return y if x.dim() == 2 else y.view(*x.shape[:-1], y.shape[-1])


def add_low_rank(
    base: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: float,
) -> torch.Tensor:
    """Return ``base + scaling * B (A x)`` in the dtype of ``base``, which is left as it is.

    For bases whose own product is not ours to write: 4-bit and 8-bit weights.

    Args:
        base: ``[..., out]``, the base module's output.
        x: ``[..., in]``.
        a: ``[r, in]``.
        b: ``[out, r]``.
        scaling: Of the update.
    """
    dtype = base.dtype
    if _autocast_to_another(dtype, x.device.type):
        with torch.autocast(x.device.type, enabled=False):
            return add_low_rank(base, x, a, b, scaling)
    rows = _in(dtype, x.reshape(-1, x.shape[-1]))  # [n, in]
    hidden = rows.mm(_in(dtype, a).t())  # [n, r]
    flat = base.reshape(-1, base.shape[-1])  # [n, out]
    return torch.addmm(flat, hidden, _in(dtype, b).t(), alpha=scaling).view(base.shape)


def product_dtype(device: str, weight: torch.dtype) -> torch.dtype:
    """Return the dtype of products with a weight: autocast's where it is on, else the weight's."""
    # Autocast leaves float64 alone.
    if torch.is_autocast_enabled(device) and weight is not torch.float64:
        return torch.get_autocast_dtype(device)
    return weight


def _autocast_to_another(dtype: torch.dtype, device: str) -> bool:
    return torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) is not dtype


def _in(dtype: torch.dtype, tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.dtype is dtype else tensor.to(dtype)
