"""Operators that round constants, and make numbers of what is rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.constant_value import Constant, Look

_SMALL = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4)
_NARROW_BITS = 4


def _cast(node: ir.Node, source: Constant, look: Look) -> Constant | None:
    del look
    wanted = node.inputs[1] if node.op_type == "CastLike" else None
    dtype = ir.DataType(node.attributes.get_int("to", 0)) if wanted is None else wanted.dtype
    if dtype is None:
        return None
    rounded = dtype.is_floating_point() and source.dtype in _SMALL
    return replace(
        source,
        dtype=dtype,
        array=lambda: source.array().astype(dtype.numpy()),
        quantized=source.quantized or rounded,
        narrow=source.narrow or (rounded and source.dtype.bitwidth <= _NARROW_BITS),
    )


def _centred_or_scaled(node: ir.Node, source: Constant, look: Look) -> Constant | None:
    """Return rounded weights less their zero point, or times their scale."""
    if not source.quantized or "axis" in node.attributes:  # before opset 7 it moves the scale
        return None
    first, second = node.inputs
    other = look(first if followed(node) is second else second)
    if other is None or not _lies_over(other.shape, source.shape):
        return None
    operation = np.multiply if node.op_type == "Mul" else np.subtract
    return replace(source, array=lambda: operation(source.array(), other.array()))


def _lies_over(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Tell whether values of one shape are spread over another that stays what it is."""
    return len(shape) <= len(whole) and all(
        length in (1, full) for length, full in zip(reversed(shape), reversed(whole), strict=False)
    )


def _dequantize(node: ir.Node, source: Constant, look: Look) -> Constant | None:
    scale = look(node.inputs[1])
    zero = look(node.inputs[2]) if len(node.inputs) > 2 else None
    if scale is None or (zero is None and len(node.inputs) > 2 and node.inputs[2] is not None):
        return None
    axis = node.attributes.get_int("axis", 1)
    block = node.attributes.get_int("block_size", 0)

    def values() -> np.ndarray:
        return dequantized(
            source.array(), scale.array(), zero.array() if zero else None, axis=axis, block=block
        )

    narrow = source.dtype.bitwidth <= _NARROW_BITS
    return replace(source, dtype=scale.dtype, array=values, quantized=True, narrow=narrow)


def _quantize(node: ir.Node, source: Constant, look: Look) -> Constant | None:
    scale = look(node.inputs[1])
    zero = look(node.inputs[2]) if len(node.inputs) > 2 else None
    if scale is None or (zero is None and len(node.inputs) > 2 and node.inputs[2] is not None):
        return None
    wanted = node.attributes.get_int("output_dtype", 0) or int(ir.DataType.UINT8)
    dtype = zero.dtype if zero is not None else ir.DataType(wanted)
    if not dtype.is_integer():
        return None
    axis = node.attributes.get_int("axis", 1)
    block = node.attributes.get_int("block_size", 0)

    def values() -> np.ndarray:
        steps = 1 << dtype.bitwidth
        lowest = -steps // 2 if dtype.is_signed() else 0
        array = source.array()
        rounded = np.rint(array / _spread(scale.array(), array.shape, axis, block))
        if zero is not None:
            rounded += _spread(zero.array(), array.shape, axis, block).astype(rounded.dtype)
        result: np.ndarray = rounded.clip(lowest, lowest + steps - 1).astype(dtype.numpy())
        return result

    return replace(source, dtype=dtype, array=values, quantized=True)


def dequantized(
    values: np.ndarray,
    scale: np.ndarray,
    zero: np.ndarray | None,
    *,
    axis: int = 1,
    block: int = 0,
) -> np.ndarray:
    """Return ``(values - zero) * scale`` in the scale's type.

    Args:
        values: Integers or 8-bit floats of any shape.
        scale: One, one for each entry of ``axis``, or one for each block along it.
        zero: Like ``scale``, or ``None`` for zero.
        axis: The quantized axis, where there is one.
        block: Entries of ``axis`` that share a scale; 0 for all or one.
    """
    centred = values.astype(np.float32)
    if zero is not None:
        centred -= _spread(zero, values.shape, axis, block).astype(np.float32)
    centred *= _spread(scale, values.shape, axis, block).astype(np.float32)
    result: np.ndarray = centred.astype(scale.dtype, copy=False)
    return result


def _spread(parameter: np.ndarray, shape: tuple[int, ...], axis: int, block: int) -> np.ndarray:
    """Return scales or zero points so that numpy lays them over values of a shape."""
    if block:
        return np.repeat(parameter, block, axis).take(np.arange(shape[axis]), axis)
    if parameter.size == 1:
        return parameter.reshape(())
    return parameter.reshape([-1 if i == axis % len(shape) else 1 for i in range(len(shape))])


def followed(node: ir.Node) -> ir.Value | None:
    """Return the input that is rearranged or rounded; a scale may come before it."""
    first = node.inputs[0]
    if node.op_type == "Mul" and first is not None:
        maker = first.producer()
        if maker is None or maker.op_type == "Constant":
            return node.inputs[1]
    return first


COMPUTING: dict[str, Callable[[ir.Node, Constant, Look], Constant | None]] = {
    "Cast": _cast,
    "CastLike": _cast,
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
    "Sub": _centred_or_scaled,
    "Mul": _centred_or_scaled,
}
