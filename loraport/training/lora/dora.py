"""DoRA while training: the norms of ``W + scaling * B A``, without ever forming it.

The square of a row's norm is ``|w|² + 2 s b·(A w) + s² b (A Aᵀ) bᵀ``: what is computed anew each
time has ``rank`` numbers a row, where the product ``B A`` would have as many as ``W``. ``|w|²`` is
kept. Source: Liu et al. 2024, arXiv:2402.09353; the norms get no gradient, as in its section 4.3.
"""

from __future__ import annotations

import torch

from loraport.training.lora.base_rows import base_rows


@torch.no_grad()
def row_squares(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return ``|w|²`` of every row of a weight ``[out, in]``, as ``[out]`` in a dtype."""
    return torch.cat([rows.square().sum(1) for _, rows in base_rows(weight, dtype)])


@torch.no_grad()
def row_norms(
    weight: torch.Tensor, squares: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float
) -> torch.Tensor:
    """Return ``|w + scaling * b A|`` of every row, ``[out]``, in the dtype of A.

    Args:
        weight: ``[out, in]``.
        squares: What `row_squares` gave for it.
        a: ``[r, in]``.
        b: ``[out, r]``.
        scaling: Factor on ``B A``.
    """
    with torch.autocast(squares.device.type, enabled=False):
        crossed = torch.cat([rows @ a.T for _, rows in base_rows(weight, a.dtype)])  # [out, r]
        total = squares + scaling * (b * (2 * crossed + scaling * (b @ (a @ a.T)))).sum(1)
    return total.clamp_min_(0).sqrt_()
