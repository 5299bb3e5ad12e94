"""Floating-point values beside an operator that reads and writes integers.

The integers stay what they are: an input is dequantized beside the operator, an output is
dequantized, changed and quantized again with the same scale. Without a change that gives the
same integers; with one the output's calibrated range still holds, so what an adapter adds beyond
it is cut off. An operator whose integers hold numbers of one sign alone has cut off its product
already, as the activation would that may be folded into it: see `product_in_floats`.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from converters.onnx.graph.quantized_values import only_reader, quantized_from
from converters.onnx.graph.rewriting import Rewrite
from converters.onnx.graph.site import Site

_INTEGERS = (ir.DataType.INT8, ir.DataType.UINT8)


def float_input(node: ir.Node, index: int, dtype: ir.DataType) -> ir.Value:
    """Return the floating-point value of an operator's input; its scale and zero point follow it.

    Args:
        node: The operator; what dequantizes goes before it.
        index: Number of the input.
        dtype: Element type of the scale.
    """
    value, scale, zero = node.inputs[index : index + 3]
    assert value is not None
    return as_floats(node, value, scale, zero, dtype)


def reading_floats(
    site: Site, value: ir.Value, scale: ir.Value | None, zero: ir.Value | None
) -> Site:
    """Return a site whose ``x`` is the floating-point value of integers that its operator reads.

    What dequantizes them goes in with a slot, where they are more than rounded.

    Args:
        site: The site; its ``x`` may be anything.
        value: The integers.
        scale: Of them.
        zero: Their zero point.
    """
    source = quantized_from(value)
    if source is not None:
        return replace(site, x=source)

    def expose() -> Site:
        x = as_floats(site.node, value, scale, zero, site.dtype)
        return replace(site, x=x)

    return replace(site, x=value, expose=expose)


def as_floats(
    node: ir.Node,
    value: ir.Value,
    scale: ir.Value | None,
    zero: ir.Value | None,
    dtype: ir.DataType,
) -> ir.Value:
    """Return the floating-point value of integers that an operator reads.

    Args:
        node: The operator; what dequantizes goes before it.
        value: The integers.
        scale: Of them.
        zero: Their zero point.
        dtype: Element type of the scale.
    """
    source = quantized_from(value)
    if source is not None:
        return source
    rewrite = Rewrite(node)
    y = rewrite.add("x", "DequantizeLinear", [value, scale, zero], [dtype])[0]
    y.shape = value.shape
    rewrite.put_before()
    return y


def float_output(
    node: ir.Node, scale: ir.Value, zero: ir.Value | None, dtype: ir.DataType
) -> ir.Value:
    """Return an operator's output in floating point, as all that follows reads it.

    Args:
        node: The operator; what dequantizes and quantizes goes after it.
        scale: Of its output.
        zero: Of its output.
        dtype: Element type of the scale.
    """
    y = node.outputs[0]
    following = only_reader(y)
    if following is not None and following.op_type == "DequantizeLinear":
        return following.outputs[0]
    rewrite = Rewrite(node)
    stored = y.dtype if y.dtype in _INTEGERS else None
    if stored is None:
        stored = (zero.dtype if zero is not None else None) or ir.DataType.UINT8
    floats = rewrite.add("y", "DequantizeLinear", [y, scale, zero], [dtype])[0]
    again = rewrite.add("quantized", "QuantizeLinear", [floats, scale, zero], [stored])[0]
    floats.shape = again.shape = y.shape
    rewrite.put_after(y, again)
    return floats
