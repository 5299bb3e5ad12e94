"""The weight of an operator that computes in integers: integers, their scale and zero point."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.constant_numbers import dequantized
from converters.onnx.graph.constant_value import Constant
from converters.onnx.graph.constants import constant


@dataclass(frozen=True)
class IntegerWeight:
    """``W = (integers - zero) * scale``."""

    _integers: Constant
    _scale: Constant
    _zero: Constant | None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of ``W``."""
        return self._integers.shape

    @property
    def dtype(self) -> ir.DataType:
        """The type of ``W``: the scale's."""
        return self._scale.dtype

    def floats(self, axis: int = 1) -> np.ndarray:
        """Return ``W``; ``axis`` is the one along which there may be several scales."""
        zero = self._zero.array() if self._zero is not None else None
        return dequantized(self._integers.array(), self._scale.array(), zero, axis=axis)


def integer_matrix(
    integers: ir.Value | None, scale: Constant | None, zero: ir.Value | None
) -> IntegerWeight | None:
    """Return a weight ``[in, out]`` or the other way round; ``None`` where a part is computed."""
    return _weight(integers, scale, zero, dimensions=(2,))


def integer_kernel(
    integers: ir.Value | None, scale: Constant | None, zero: ir.Value | None
) -> IntegerWeight | None:
    """Return the kernel of a convolution, ``[out, in / groups, *kernel]``, as `integer_matrix`."""
    return _weight(integers, scale, zero, dimensions=(3, 4, 5))


def _weight(
    integers: ir.Value | None,
    scale: Constant | None,
    zero: ir.Value | None,
    dimensions: tuple[int, ...],
) -> IntegerWeight | None:
    stored, zeros = constant(integers), constant(zero)
    if stored is None or scale is None or (zero is not None and zeros is None):
        return None
    return IntegerWeight(stored, scale, zeros) if len(stored.shape) in dimensions else None
