"""The floating-point values around an operator whose inputs and outputs are quantized.

A slot computes in floating point: it reads the activation before it is rounded and adds to the
output after it was, so that neither rounding nor the output's calibrated range touches it.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from converters.onnx.graph.constant_value import Constant
from converters.onnx.graph.constants import constant

_QUANTIZE = ("QuantizeLinear", "DynamicQuantizeLinear")


def unrounded(value: ir.Value) -> ir.Value:
    """Return what was quantized and dequantized again to give this value, or the value itself."""
    dequantize = value.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return value
    return quantized_from(dequantize.inputs[0]) or value


def quantized_from(value: ir.Value | None) -> ir.Value | None:
    """Return the floating-point value that was quantized to give this one, if there is one."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type not in _QUANTIZE or value is not node.outputs[0]:
        return None
    return node.inputs[0]


def rounded(value: ir.Value) -> ir.Value:
    """Return this value after it is quantized and dequantized, where that is all it is read for."""
    for operator in ("QuantizeLinear", "DequantizeLinear"):
        only = only_reader(value)
        if only is None or only.op_type != operator or only.inputs[0] is not value:
            return value
        following = only.outputs[0]
        if operator == "DequantizeLinear":
            return following
        if (after := only_reader(following)) is None or after.op_type != "DequantizeLinear":
            return value
        value = following
    return value


def only_reader(value: ir.Value) -> ir.Node | None:
    """Return the one node that reads a value that is no output of the graph, else ``None``."""
    readers = value.consumers()
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None


@dataclass(frozen=True)
class ScaledProduct:
    """An integer product as a float.

    Attributes:
        y: The value.
        scale: Of the constant factor.
        biased: Something was added in integers.
    """

    y: ir.Value
    scale: Constant
    biased: bool


def scaled_product(node: ir.Node) -> ScaledProduct | None:
    """Return what an integer product is as a float.

    ``node -> Cast -> Mul(x_scale * weight_scale)`` is what quantizers write; ONNX Runtime's first
    ones added a bias in integers before the ``Cast``.
    """
    cast = only_reader(node.outputs[0])
    biased = cast is not None and cast.op_type == "Add"
    if cast is not None and biased:
        if cast.inputs[0] is cast.inputs[1]:
            return None
        cast = only_reader(cast.outputs[0])
    if cast is None or cast.op_type != "Cast":
        return None
    scaled = only_reader(cast.outputs[0])
    if scaled is None or scaled.op_type != "Mul":
        return None
    factors = [value for value in scaled.inputs if value is not cast.outputs[0]]
    both = factors[0].producer() if len(factors) == 1 and factors[0] is not None else None
    if both is None or both.op_type != "Mul":
        return None
    quantize = node.inputs[0].producer() if node.inputs[0] is not None else None
    own = (*quantize.inputs[1:2], *quantize.outputs[1:2]) if quantize is not None else ()
    for value in both.inputs:
        scale = constant(value)
        if scale is not None and not any(value is known for known in own):
            return ScaledProduct(scaled.outputs[0], scale, biased)
    return None
