"""Sizes that a graph computes of a constant, to reshape it: they are constants, too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.constant_shapes import integers
from converters.onnx.graph.constant_value import Constant, Look


def _shape(node: ir.Node, value: ir.Value, source: Constant, look: Look) -> Constant:
    del look
    last = node.attributes.get("end")  # both from opset 15 on
    part = slice(node.attributes.get_int("start", 0), None if last is None else last.as_int())
    sizes = np.array(source.shape[part], np.int64)
    return Constant(value.name or "", sizes.shape, ir.DataType.INT64, lambda: sizes)


def _product(node: ir.Node, value: ir.Value, source: Constant, look: Look) -> Constant | None:
    axes = integers(node, 1, "axes", look)
    given = len(node.inputs) > 1 and node.inputs[1] is not None
    if not source.dtype.is_integer() or (given and not axes):
        return None
    numbers = source.array()
    keep = bool(node.attributes.get_int("keepdims", 1))
    over = None if axes is None else tuple(axes)
    product = np.asarray(numbers.prod(over, numbers.dtype, keepdims=keep))
    return replace(source, name=value.name or "", shape=product.shape, array=lambda: product)


SIZES: dict[str, Callable[[ir.Node, ir.Value, Constant, Look], Constant | None]] = {
    "Shape": _shape,
    "ReduceProd": _product,
}
