"""Constants of a graph, seen through the operators that only rearrange or round them.

A weight may reach its operator through ``Transpose``, ``Identity``, ``Cast``, ``Reshape`` or
``DequantizeLinear``, maybe rounded by ``QuantizeLinear`` before, or as small integers through
``Cast``, ``Sub`` of a zero point and ``Mul`` by a scale; it may be a part of a constant
(``Split``, ``Slice``, ``Gather``) or put together of several (``Concat``): shape, type and name are
known at once, the values when they are asked for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True, eq=False)
class Constant:
    """A value that no input of the graph changes.

    Attributes:
        name: The initializer or node output it comes from; a part's, and what is put together of
            several, is its own.
        shape: Its shape.
        dtype: Its element type.
        array: Gives its values; of a large one as a view of the file.
        quantized: It is dequantized, so a rounding of what was exported.
    """

    name: str
    shape: tuple[int, ...]
    dtype: ir.DataType
    array: Callable[[], np.ndarray]
    quantized: bool = False


# No exporter writes more operators one after the other, nor scales whose scales are scaled again.
_LONGEST = 64
_DEEPEST = 3
_SMALL = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4)


def constant(value: ir.Value | None, depth: int = 0) -> Constant | None:
    """Return a value as a constant, or ``None`` if it is computed from something else.

    Args:
        value: Any value of a graph.
        depth: How many constants it is a scale, a zero point or a shape of.
    """
    passed: list[ir.Value] = []  # from the value back to what is stored
    found: Constant | None = None
    while found is None:
        if value is None or len(passed) > _LONGEST or depth > _DEEPEST:
            return None
        node = value.producer()
        if value.const_value is not None:
            found = _of_tensor(value.name or "", value.const_value)
        elif node is None or node.domain not in ("", "ai.onnx", "com.microsoft"):
            return None
        elif node.op_type == "Constant":
            found = _of_constant_node(node)
            if found is None:
                return None
        elif node.op_type == "Identity":
            value = node.inputs[0]
        elif (node.op_type in _RULES or node.op_type in _PARTS) and node.inputs:
            passed.append(value)
            value = _followed(node)
        else:
            return None
    for value in reversed(passed):
        node = value.producer()
        assert node is not None
        if node.op_type in _PARTS:
            found = _PARTS[node.op_type](node, value, found, depth + 1)
        else:
            found = _RULES[node.op_type](node, found, depth + 1)
        if found is None:
            return None
    return found


def _followed(node: ir.Node) -> ir.Value | None:
    """Return the input that is rearranged or rounded; a scale may come before it."""
    first = node.inputs[0]
    if node.op_type == "Mul" and first is not None:
        maker = first.producer()
        if maker is None or maker.op_type == "Constant":
            return node.inputs[1]
    return first


def vector(value: ir.Value | None, length: int) -> bool:
    """Tell whether a value is a constant ``[length]``."""
    found = constant(value)
    return found is not None and found.shape == (length,)


def _of_tensor(name: str, tensor: ir.TensorProtocol) -> Constant:
    return Constant(name, tuple(tensor.shape.numpy()), tensor.dtype, tensor.numpy)


def _of_constant_node(node: ir.Node) -> Constant | None:
    attribute = node.attributes.get("value")
    if attribute is not None:
        return _of_tensor(node.outputs[0].name or "", attribute.as_tensor())
    for name, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        attribute = node.attributes.get(name)
        if attribute is not None:
            return _of_tensor(
                node.outputs[0].name or "", ir.tensor(np.array(attribute.value, dtype))
            )
    return None


def _transpose(node: ir.Node, source: Constant, depth: int) -> Constant:
    del depth
    order = node.attributes.get("perm")
    axes = (
        tuple(order.as_ints()) if order is not None else tuple(reversed(range(len(source.shape))))
    )
    shape = tuple(source.shape[axis] for axis in axes)
    return replace(source, shape=shape, array=lambda: source.array().transpose(axes))


def _cast(node: ir.Node, source: Constant, depth: int) -> Constant | None:
    del depth
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
    )


def _centred_or_scaled(node: ir.Node, source: Constant, depth: int) -> Constant | None:
    """Return rounded weights less their zero point, or times their scale."""
    if not source.quantized or "axis" in node.attributes:  # before opset 7 it moves the scale
        return None
    first, second = node.inputs
    other = constant(first if _followed(node) is second else second, depth)
    if other is None or not _lies_over(other.shape, source.shape):
        return None
    operation = np.multiply if node.op_type == "Mul" else np.subtract
    return replace(source, array=lambda: operation(source.array(), other.array()))


def _lies_over(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Tell whether values of one shape are spread over another that stays what it is."""
    return len(shape) <= len(whole) and all(
        length in (1, full) for length, full in zip(reversed(shape), reversed(whole), strict=False)
    )


def _reshape(node: ir.Node, source: Constant, depth: int) -> Constant | None:
    wanted = constant(node.inputs[1], depth) if len(node.inputs) > 1 else None
    if wanted is None or node.attributes.get_int("allowzero", 0) != 0:
        return None
    sizes = [int(size) for size in wanted.array()]
    shape = [source.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    if -1 in shape:
        known = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = math.prod(source.shape) // max(known, 1)
    return replace(source, shape=tuple(shape), array=lambda: source.array().reshape(shape))


def _flatten(node: ir.Node, source: Constant, depth: int) -> Constant:
    del depth
    axis = node.attributes.get_int("axis", 1)
    rows, columns = source.shape[:axis], source.shape[axis:]
    return _reshaped(source, (math.prod(rows), math.prod(columns)))


def _squeeze(node: ir.Node, source: Constant, depth: int) -> Constant | None:
    axes = _integers(node, 1, "axes", depth)
    if axes is None and len(node.inputs) > 1:
        return None
    rank = len(source.shape)
    ones = [axis for axis, length in enumerate(source.shape) if length == 1]
    gone = ones if axes is None else [axis % rank for axis in axes]
    return _reshaped(source, [n for axis, n in enumerate(source.shape) if axis not in gone])


def _unsqueeze(node: ir.Node, source: Constant, depth: int) -> Constant | None:
    axes = _integers(node, 1, "axes", depth)
    if axes is None:
        return None
    left = iter(source.shape)
    rank = len(source.shape) + len(axes)
    made = {axis % rank for axis in axes}
    return _reshaped(source, [1 if axis in made else next(left) for axis in range(rank)])


def _reshaped(source: Constant, shape: Sequence[int]) -> Constant:
    return replace(source, shape=tuple(shape), array=lambda: source.array().reshape(shape))


def _slice(node: ir.Node, value: ir.Value, source: Constant, depth: int) -> Constant | None:
    starts, ends, axes, steps = (
        _integers(node, number, name, depth)
        for number, name in enumerate(("starts", "ends", "axes", "steps"), start=1)
    )
    unknown = [n for n in (3, 4) if len(node.inputs) > n and node.inputs[n] is not None]
    if starts is None or ends is None or len(unknown) > sum(e is not None for e in (axes, steps)):
        return None
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    parts = [slice(None)] * len(source.shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        parts[axis] = slice(start, end, step)
    return _part(value, source, parts)


def _split(node: ir.Node, value: ir.Value, source: Constant, depth: int) -> Constant | None:
    axis = node.attributes.get_int("axis", 0)
    length, number = source.shape[axis], len(node.outputs)
    sizes = _integers(node, 1, "split", depth)
    if sizes is None:
        if len(node.inputs) > 1 and node.inputs[1] is not None:
            return None
        sizes = [-(-length // number)] * number  # the last one is what is left
    index = value.index()
    assert index is not None
    start = sum(sizes[:index])
    parts = [slice(None)] * len(source.shape)
    parts[axis] = slice(start, start + sizes[index])
    return _part(value, source, parts)


def _gather(node: ir.Node, value: ir.Value, source: Constant, depth: int) -> Constant | None:
    picked = constant(node.inputs[1], depth)
    if picked is None:
        return None
    axis = node.attributes.get_int("axis", 0) % len(source.shape)
    return replace(
        source,
        name=value.name or "",
        shape=(*source.shape[:axis], *picked.shape, *source.shape[axis + 1 :]),
        array=lambda: source.array().take(picked.array(), axis),
    )


def _part(value: ir.Value, source: Constant, parts: Sequence[slice]) -> Constant:
    shape = tuple(
        len(range(*part.indices(length))) for part, length in zip(parts, source.shape, strict=True)
    )
    return replace(
        source, name=value.name or "", shape=shape, array=lambda: source.array()[tuple(parts)]
    )


def _concat(node: ir.Node, value: ir.Value, source: Constant, depth: int) -> Constant | None:
    rest = [constant(each, depth) for each in node.inputs[1:]]
    known = [source, *(each for each in rest if each is not None)]
    if len(known) != len(node.inputs):
        return None
    axis = node.attributes.get_int("axis", 0) % len(source.shape)
    shape = list(source.shape)
    shape[axis] = sum(each.shape[axis] for each in known)
    return replace(
        source,
        name=value.name or "",
        shape=tuple(shape),
        array=lambda: np.concatenate([each.array() for each in known], axis),
        quantized=any(each.quantized for each in known),
    )


def _integers(node: ir.Node, number: int, name: str, depth: int) -> Sequence[int] | None:
    """Return what was an attribute before it was an input, if it is given and a constant."""
    attribute = node.attributes.get(name)
    if attribute is not None:
        return attribute.as_ints()
    found = constant(node.inputs[number], depth) if len(node.inputs) > number else None
    return None if found is None else [int(each) for each in found.array().ravel()]


def _dequantize(node: ir.Node, source: Constant, depth: int) -> Constant | None:
    scale = constant(node.inputs[1], depth)
    zero = constant(node.inputs[2], depth) if len(node.inputs) > 2 else None
    if scale is None or (zero is None and len(node.inputs) > 2 and node.inputs[2] is not None):
        return None
    axis = node.attributes.get_int("axis", 1)
    block = node.attributes.get_int("block_size", 0)

    def values() -> np.ndarray:
        return dequantized(
            source.array(), scale.array(), zero.array() if zero else None, axis=axis, block=block
        )

    return replace(source, dtype=scale.dtype, array=values, quantized=True)


def _quantize(node: ir.Node, source: Constant, depth: int) -> Constant | None:
    scale = constant(node.inputs[1], depth)
    zero = constant(node.inputs[2], depth) if len(node.inputs) > 2 else None
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


_RULES: dict[str, Callable[[ir.Node, Constant, int], Constant | None]] = {
    "Transpose": _transpose,
    "Cast": _cast,
    "CastLike": _cast,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "DequantizeLinear": _dequantize,
    "QuantizeLinear": _quantize,
    "Sub": _centred_or_scaled,
    "Mul": _centred_or_scaled,
}
_PARTS: dict[str, Callable[[ir.Node, ir.Value, Constant, int], Constant | None]] = {
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "Concat": _concat,
}
