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
# Rounding moves a row of n numbers along itself by 1/n of what it moves it by, a factor by all of
# it: that of a normalization that was folded in, or of smoothing.
_ALONG = 0.9
_FEWEST = 8  # numbers of a row that tell
_TINY = 1e-30  # the square of a row of zeros, which no factor changes
_NEAR_ONE = 0.02  # factors that move less than rounding to 8 bits


def allowed_distance(site: Site) -> float:
    """Return how far a site's stored weight may be from the base's; 0 if it is the base's own."""
    if site.quantized:
        return _TWO_BITS if site.node.attributes.get_int("bits", 8) <= _FEW_BITS else _QUANTIZED
    return _HALF if site.dtype in _HALVES else 0.0


def weight_distance(module: SlottableModule, weight: np.ndarray) -> float:
    """Return the distance of a graph's weight from a module's.

    Values that are equal in the coarser of the two precisions count as equal: a graph may hold
    what was rounded to half precision, a checkpoint too. One whose outputs or inputs have factors
    is another weight, however near: an adapter's update would lack them.

    Args:
        module: Of the base.
        weight: ``[in, out]``, as a site has it.
    """
    if weight.shape != (module.in_features, module.out_features):
        return math.inf
    step = max(_PIECE_ELEMENTS // max(module.in_features, 1), 1)
    apart = size = outputs_scaled = 0.0
    of_inputs, moved = torch.zeros(2, module.in_features)
    coarse_alike = [True, True]
    for start in range(0, module.out_features, step):
        ours = module.rows(start, min(start + step, module.out_features)).float()
        theirs = torch.from_numpy(
            np.ascontiguousarray(weight[:, start : start + step].T).astype(np.float32)
        )
        if not torch.equal(ours, theirs):
            change = theirs - ours
            apart += _squares(change)
            outputs_scaled += _along((ours * change).sum(1), ours.square().sum(1))
            moved += (ours * change).sum(0)
            coarse_alike = [
                alike and _equal_as(dtype, ours, theirs)
                for alike, dtype in zip(coarse_alike, (torch.float16, torch.bfloat16), strict=True)
            ]
        of_inputs += ours.square().sum(0)
        size += _squares(ours)
    if apart == 0 or any(coarse_alike):
        return 0.0
    scaled = max(
        outputs_scaled if module.in_features >= _FEWEST else 0.0,
        _along(moved, of_inputs) if module.out_features >= _FEWEST else 0.0,
    )
    if not size or scaled > max(_ALONG * apart, _NEAR_ONE**2 * size):
        return math.inf
    return math.sqrt(apart / size)


def _along(moved: torch.Tensor, squares: torch.Tensor) -> float:
    """Return how much of squared changes is a factor on each row.

    Args:
        moved: ``row . change`` ``[n]``.
        squares: ``row . row`` ``[n]``.
    """
    return float((moved.double().square() / squares.double().clamp_min(_TINY)).sum())


def _equal_as(dtype: torch.dtype, ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    """Compare ``[n, in]``; what differs at all mostly does so in its first row."""

    def equal(one: torch.Tensor, other: torch.Tensor) -> bool:
        coarse = other.to(dtype)
        return torch.equal(one.to(dtype), coarse) and torch.equal(coarse.float(), other)

    return equal(ours[:1], theirs[:1]) and equal(ours, theirs)


def _squares(values: torch.Tensor) -> float:
    wide = values.flatten().double()  # a quarter of the time of a norm that widens by itself
    return float(wide.dot(wide))
