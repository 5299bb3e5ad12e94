"""Operators that give constants other dimensions, take them apart and put them together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.constant_value import Constant, Look


def _transpose(node: ir.Node, source: Constant, look: Look) -> Constant:
    del look
    order = node.attributes.get("perm")
    axes = (
        tuple(order.as_ints()) if order is not None else tuple(reversed(range(len(source.shape))))
    )
    shape = tuple(source.shape[axis] for axis in axes)
    return replace(source, shape=shape, array=lambda: source.array().transpose(axes))


def _reshape(node: ir.Node, source: Constant, look: Look) -> Constant | None:
    wanted = look(node.inputs[1]) if len(node.inputs) > 1 else None
    if wanted is None or node.attributes.get_int("allowzero", 0) != 0:
        return None
    sizes = [int(size) for size in wanted.array()]
    shape = [source.shape[i] if size == 0 else size for i, size in enumerate(sizes)]
    if -1 in shape:
        known = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = math.prod(source.shape) // max(known, 1)
    return replace(source, shape=tuple(shape), array=lambda: source.array().reshape(shape))


def _flatten(node: ir.Node, source: Constant, look: Look) -> Constant:
    del look
    axis = node.attributes.get_int("axis", 1)
    rows, columns = source.shape[:axis], source.shape[axis:]
    return _reshaped(source, (math.prod(rows), math.prod(columns)))


def _squeeze(node: ir.Node, source: Constant, look: Look) -> Constant | None:
    axes = integers(node, 1, "axes", look)
    if axes is None and len(node.inputs) > 1:
        return None
    rank = len(source.shape)
    ones = [axis for axis, length in enumerate(source.shape) if length == 1]
    gone = ones if axes is None else [axis % rank for axis in axes]
    return _reshaped(source, [n for axis, n in enumerate(source.shape) if axis not in gone])


def _unsqueeze(node: ir.Node, source: Constant, look: Look) -> Constant | None:
    axes = integers(node, 1, "axes", look)
    if axes is None:
        return None
    left = iter(source.shape)
    rank = len(source.shape) + len(axes)
    made = {axis % rank for axis in axes}
    return _reshaped(source, [1 if axis in made else next(left) for axis in range(rank)])


def _reshaped(source: Constant, shape: Sequence[int]) -> Constant:
    return replace(source, shape=tuple(shape), array=lambda: source.array().reshape(shape))


def _slice(node: ir.Node, value: ir.Value, source: Constant, look: Look) -> Constant | None:
    starts, ends, axes, steps = (
        integers(node, number, name, look)
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


def _split(node: ir.Node, value: ir.Value, source: Constant, look: Look) -> Constant | None:
    axis = node.attributes.get_int("axis", 0)
    length, number = source.shape[axis], len(node.outputs)
    sizes = integers(node, 1, "split", look)
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


def _gather(node: ir.Node, value: ir.Value, source: Constant, look: Look) -> Constant | None:
    picked = look(node.inputs[1])
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


def _concat(node: ir.Node, value: ir.Value, source: Constant, look: Look) -> Constant | None:
    rest = [look(each) for each in node.inputs[1:]]
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
        narrow=any(each.narrow for each in known),
    )


def integers(node: ir.Node, number: int, name: str, look: Look) -> Sequence[int] | None:
    """Return what was an attribute before it was an input, if it is given and a constant."""
    attribute = node.attributes.get(name)
    if attribute is not None:
        return attribute.as_ints()
    found = look(node.inputs[number]) if len(node.inputs) > number else None
    return None if found is None else [int(each) for each in found.array().ravel()]


SHAPING: dict[str, Callable[[ir.Node, Constant, Look], Constant | None]] = {
    "Transpose": _transpose,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
}
PARTS: dict[str, Callable[[ir.Node, ir.Value, Constant, Look], Constant | None]] = {
    "Slice": _slice,
    "Split": _split,
    "Gather": _gather,
    "Concat": _concat,
}
