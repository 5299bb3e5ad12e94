"""``Gather`` of rows of a constant matrix: an embedding; of integers that are dequantized after.

Quantizers let integers be moved (transposed, reshaped) before they are dequantized, in one place
or in several. A slot needs the rows as floats, so they are dequantized at once then, which by one
scale for all gives the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.constant_numbers import dequantized
from converters.onnx.graph.constant_value import Constant
from converters.onnx.graph.constants import constant
from converters.onnx.graph.quantized_values import rounded
from converters.onnx.graph.rewriting import Rewrite
from converters.onnx.graph.site import Site
from loraport.adapter import ModuleKind

_MOVING = ("Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity")
_ROUNDED = (ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.UINT4, ir.DataType.INT4)


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where no rows of a constant matrix of floats are gathered."""
    table, tokens = node.inputs
    rows_of = constant(table)
    if tokens is None or rows_of is None or len(rows_of.shape) != 2:
        return None
    if node.attributes.get_int("axis", 0) not in (0, -2) or constant(tokens) is not None:
        return None
    rows, columns = rows_of.shape
    site = Site(
        node=node,
        x=tokens,
        y=rounded(node.outputs[0]),
        in_features=rows,
        out_features=columns,
        dtype=rows_of.dtype,
        weight=rows_of.array,
        quantized=rows_of.quantized,
        kind=ModuleKind.EMBEDDING,
    )
    return site if rows_of.dtype.is_floating_point() else _of_integers(site, rows_of)


def holds_rounded_rows(node: ir.Node) -> bool:
    """Tell whether rows of a constant matrix of small integers are gathered: rounded weights."""
    table = constant(node.inputs[0])
    return (
        table is not None
        and len(table.shape) == 2
        and table.dtype in _ROUNDED
        and constant(node.inputs[1]) is None
    )


def _of_integers(site: Site, table: Constant) -> Site | None:
    """Return the site where all that becomes of the rows is floats, by one scale for all."""
    read = _dequantized(site.node.outputs[0])
    if not read:
        return None
    first, scale, zero = read[0].node, read[0].scale, read[0].zero
    if any(not read[0].rounds_like(other) for other in read):
        return None
    found = replace(
        site,
        y=site.node.outputs[0],
        dtype=scale.dtype,
        weight=_weight(table, scale, zero),
        quantized=True,
    )
    if len(read) == 1 and first.inputs[0] is found.y:
        return replace(found, y=rounded(first.outputs[0]))

    def expose() -> Site:
        """Dequantize the rows before anything moves them."""
        for value in _moved(found.y):
            value.type = ir.TensorType(scale.dtype)
        rewrite = Rewrite(site.node)
        inputs = [found.y, *first.inputs[1:]]
        (y,) = rewrite.add("DequantizeLinear", "DequantizeLinear", inputs, [scale.dtype])
        y.shape = found.y.shape
        rewrite.put_after(found.y, y)
        for each in read:
            following = Rewrite(each.node)
            same = following.add("Identity", "Identity", [each.node.inputs[0]], [scale.dtype])
            following.replace(same)
        return replace(found, y=y, expose=None)

    return replace(found, expose=expose)


@dataclass(frozen=True)
class _Dequantized:
    """An operator that makes floats of integers, by one scale and zero for all."""

    node: ir.Node
    scale: Constant
    zero: Constant | None

    def rounds_like(self, other: _Dequantized) -> bool:
        """Tell whether another does the same."""
        same_zero = (self.zero is None) == (other.zero is None)
        if self.zero is not None and other.zero is not None:
            same_zero = np.array_equal(self.zero.array().ravel(), other.zero.array().ravel())
        scales = self.scale.array().ravel(), other.scale.array().ravel()
        return bool(same_zero and np.array_equal(*scales))


def _dequantized(value: ir.Value) -> list[_Dequantized]:
    """Return what makes floats of a value, wherever it is moved; none if others read it, too."""
    found = []
    for place in (value, *_moved(value)):
        if place.is_graph_output():
            return []
        for usage in place.uses():
            node = usage.node
            if usage.idx == 0 and node.op_type in _MOVING:
                continue
            scale = constant(node.inputs[1]) if len(node.inputs) > 1 else None
            given = node.inputs[2] if len(node.inputs) > 2 else None
            zero = constant(given)
            if usage.idx or node.op_type != "DequantizeLinear" or scale is None:
                return []
            if (given is None) != (zero is None):
                return []
            if any(length != 1 for known in (scale, zero) if known for length in known.shape):
                return []
            found.append(_Dequantized(node, scale, zero))
    return found


def _moved(value: ir.Value) -> list[ir.Value]:
    """Return what operators that only move numbers make of a value, one after the other."""
    found: list[ir.Value] = []
    left = [value]
    while left:
        for usage in left.pop().uses():
            if usage.idx == 0 and usage.node.op_type in _MOVING:
                found.append(usage.node.outputs[0])
                left.append(usage.node.outputs[0])
    return found


def _weight(table: Constant, scale: Constant, zero: Constant | None) -> Callable[[], np.ndarray]:
    return lambda: dequantized(table.array(), scale.array(), zero.array() if zero else None)
