"""How far a graph's weight is from a module's, and how far it may be.

``distance = |graph - module| / |module|`` in the Frobenius norm, read in pieces, so that neither
weight need be in memory.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir
import torch

from converters.onnx.graph.site import Site
from converters.onnx.modules.slottable import SlottableModule

_PIECE_ELEMENTS = 1 << 22
# 4-bit blocks stay below 0.2, 2-bit ones below 0.7 and 8-bit ones below 0.02, where unrelated
# weights are at 1.4.
_QUANTIZED = 0.5
_TWO_BITS = 0.9
# bfloat16 rounds by up to 2^-9 each; converters to float16 raise the smallest values, too.
_HALF = 5e-3
_HALVES = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_FEW_BITS = 2


def allowed_distance(site: Site) -> float:
    """Return how far a site's stored weight may be from the base's; 0 if it is the base's own."""
    if site.quantized:
        return _TWO_BITS if site.node.attributes.get_int("bits", 8) <= _FEW_BITS else _QUANTIZED
    return _HALF if site.dtype in _HALVES else 0.0


def weight_distance(module: SlottableModule, weight: np.ndarray) -> float:
    """Return the distance of a graph's weight from a module's.

    Values that are equal in the coarser of the two precisions count as equal: a graph may hold
    what was rounded to half precision, a checkpoint too.

    Args:
        module: Of the base.
        weight: ``[in, out]``, as a site has it.
    """
    if weight.shape != (module.in_features, module.out_features):
        return math.inf
    step = max(_PIECE_ELEMENTS // max(module.in_features, 1), 1)
    apart = size = 0.0
    coarse_alike = [True, True]
    for start in range(0, module.out_features, step):
        ours = module.rows(start, min(start + step, module.out_features)).float()
        theirs = torch.from_numpy(
            np.ascontiguousarray(weight[:, start : start + step].T).astype(np.float32)
        )
        if not torch.equal(ours, theirs):
            apart += _squares(ours - theirs)
            coarse_alike = [
                alike and _equal_as(dtype, ours, theirs)
                for alike, dtype in zip(coarse_alike, (torch.float16, torch.bfloat16), strict=True)
            ]
        size += _squares(ours)
    if apart == 0 or any(coarse_alike):
        return 0.0
    return math.sqrt(apart / size) if size else math.inf


def _equal_as(dtype: torch.dtype, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Compare ``[n, in]``; what differs at all mostly does so in its first row."""

    def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
        coarse = other.to(dtype)
        return torch.equal(one.to(dtype), coarse) and torch.equal(coarse.float(), other)

    return equal(ours[:1], theirs[:1]) and equal(ours, theirs)


def _squares(values: torch.Tensor) -> float:
    wide = values.flatten().double()  # a quarter of the time of a norm that widens by itself
    return float(wide.dot(wide))
