"""The floating-point values around an operator whose inputs and outputs are quantized.

A slot computes in floating point: it reads the activation before it is rounded and adds to the
output after it was, so that neither rounding nor the output's calibrated range touches it. Where
integers hold numbers of one sign alone, more happens than rounding: ONNX Runtime's quantizers take
out a ``Relu``, or a ``Clip`` from zero, that such a range replaces. There a slot reads what was
cut off and adds before it is.
"""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.graph.constants import constant

_DYNAMIC = "DynamicQuantizeLinear"  # its range is that of the numbers it is given


def unrounded(value: ir.Value) -> ir.Value:
    """Return what was quantized and dequantized again to give this value, or the value itself."""
    dequantize = value.producer()
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return value
    return quantized_from(dequantize.inputs[0]) or value


def quantized_from(value: ir.Value | None) -> ir.Value | None:
    """Return the floating-point value that was rounded to give this one, if there is one."""
    node = value.producer() if value is not None else None
    if node is None or value is not node.outputs[0]:
        return None
    if node.op_type != _DYNAMIC and (node.op_type != "QuantizeLinear" or _cuts_off(node)):
        return None
    return node.inputs[0]


def rounded(value: ir.Value) -> ir.Value:
    """Return this value after it is quantized and dequantized, where that is all it is read for."""
    quantize = only_reader(value)
    if quantize is None or quantize.op_type != "QuantizeLinear" or _cuts_off(quantize):
        return value
    dequantize = only_reader(quantize.outputs[0]) if quantize.inputs[0] is value else None
    if dequantize is None or dequantize.op_type != "DequantizeLinear":
        return value
    return dequantize.outputs[0] if dequantize.inputs[0] is quantize.outputs[0] else value


def holds_one_sign(zero: ir.Value | None, stored: ir.DataType = ir.DataType.UINT8) -> bool:
    """Tell whether integers stand for numbers of one sign alone, so that the others are cut off.

    Args:
        zero: Their zero point, which is 0 where there is none; one that is no constant may be
            any.
        stored: Their type, where there is no zero point to tell it.
    """
    known = constant(zero)
    if zero is not None and known is None:
        return True
    dtype = stored if known is None else known.dtype
    if not dtype.is_integer():
        return False
    lowest = -(1 << dtype.bitwidth - 1) if dtype.is_signed() else 0
    bounds = (lowest, lowest + (1 << dtype.bitwidth) - 1)
    zeros = [0] if known is None else known.array().astype(int).ravel().tolist()
    return any(number in bounds for number in zeros)


def _cuts_off(quantize: ir.Node) -> bool:
    stored = quantize.attributes.get_int("output_dtype", 0) or int(ir.DataType.UINT8)
    zero = quantize.inputs[2] if len(quantize.inputs) > 2 else None
    return holds_one_sign(zero, ir.DataType(stored))


def only_reader(value: ir.Value) -> ir.Node | None:
    """Return the one node that reads a value that is no output of the graph, else ``None``."""
    readers = value.consumers()
    return readers[0] if len(readers) == 1 and not value.is_graph_output() else None
