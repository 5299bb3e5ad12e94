"""The floating-point values around an operator whose inputs and outputs are quantized.

A slot computes in floating point: it reads the activation before it is rounded and adds to the
output after it was, so that neither rounding nor the output's calibrated range touches it.
"""

from __future__ import annotations

import onnx_ir as ir

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
