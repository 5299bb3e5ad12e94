"""DoRA while training: the norms of ``W + scaling * B A``, without ever forming it.

The square of a row's norm is ``|w|² + 2 s b·(A w) + s² b (A Aᵀ) bᵀ``: what is computed anew each
time has ``rank`` numbers a row, where the product ``B A`` would have as many as ``W``. ``|w|²`` is
kept. Source: Liu et al. 2024, arXiv:2402.09353; the norms get no gradient, as in its section 4.3.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from loraport.training.lora.base_rows import base_rows

if TYPE_CHECKING:
    from loraport.training.lora.lora_layer import LoraLayer


@torch.no_grad()
def row_squares(layer: LoraLayer) -> torch.Tensor:
    """Return ``|w|²`` of every row of the base weight, ``[out]``, in the dtype of A."""
    return torch.cat([rows.square().sum(1) for _, rows in base_rows(layer)])


@torch.no_grad()
def row_norms(layer: LoraLayer, squares: torch.Tensor) -> torch.Tensor:
    """Return ``|w + scaling * b A|`` of every row, ``[out]``, in the dtype of A.

    Args:
        layer: The layer, of a single group.
        squares: What `row_squares` gave.
    """
    with torch.autocast(squares.device.type, enabled=False):
        a, b = (matrix.flatten(1) for matrix in layer.matrices())  # [r, in], [out, r]
        crossed = torch.cat([rows @ a.T for _, rows in base_rows(layer)])  # [out, r]
        s = layer.scaling
        total = squares + s * (b * (2 * crossed + s * (b @ (a @ a.T)))).sum(1)
    return total.clamp_min_(0).sqrt_()
