"""A place in a graph where a slot can go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True, eq=False)
class Site:
    """A linear operator ``y = x W`` with a constant weight.

    Attributes:
        node: The operator.
        x: Its activation input ``[..., in]``.
        y: Its output ``[..., out]``.
        in_features: Last dimension of ``x``.
        out_features: Last dimension of ``y``.
        dtype: Element type of the activations, and so of the slot.
        weight: Gives the weight as ``[in, out]``, dequantized if need be.
        quantized: The stored weight is a rounding of the base's.
    """

    node: ir.Node
    x: ir.Value
    y: ir.Value
    in_features: int
    out_features: int
    dtype: ir.DataType
    weight: Callable[[], np.ndarray]
    quantized: bool = False
