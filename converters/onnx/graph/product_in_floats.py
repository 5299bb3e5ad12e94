"""A product of integers as the floating-point operator that it stands for, between quantizers.

``DequantizeLinear -> MatMul, Gemm or Conv -> QuantizeLinear`` is what a quantizer writes in the
format QDQ of the same layer. Unlike the operator of integers it has a value that nothing is cut
off from yet: where the integers hold numbers of one sign alone, as where an activation is folded
into them, that is where an adapter has to be added.
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.constants import constant
from converters.onnx.graph.quantized_values import holds_one_sign
from converters.onnx.graph.rewriting import Rewrite, opset_of
from converters.onnx.graph.site import Site, inputs_of

_FLOATS = {"QLinearMatMul": "MatMul", "QGemm": "Gemm", "QLinearConv": "Conv"}
_SCALES_OF_OUTPUTS = {"QLinearMatMul": 6, "QGemm": 7, "QLinearConv": 6}  # zero points follow
_BIASES = {"QGemm": 6, "QLinearConv": 8}
_ONE = ((), (1,))
_HAS_AXES = 13  # DequantizeLinear, from this opset on


def cuts_its_product_off(node: ir.Node) -> bool:
    """Tell whether an operator gives integers that stand for numbers of one sign alone."""
    index = _SCALES_OF_OUTPUTS.get(node.op_type)
    if index is None:
        return False
    scale, zero = inputs_of(node, index + 2)[index:]
    return scale is not None and holds_one_sign(zero, node.outputs[0].dtype or ir.DataType.UINT8)


def has_floats(node: ir.Node) -> bool:
    """Tell whether `in_floats` can write this operator in floating point.

    Args:
        node: A ``QLinearMatMul``, ``QGemm`` or ``QLinearConv`` with a constant weight.
    """
    inputs = inputs_of(node, 9)
    scale, zero, x_scale = constant(inputs[4]), constant(inputs[5]), constant(inputs[1])
    if opset_of(node) < _HAS_AXES or scale is None or x_scale is None:
        return False
    if scale.dtype is not ir.DataType.FLOAT or len(scale.shape) > 1 or x_scale.shape not in _ONE:
        return False
    if zero is not None and zero.shape != scale.shape:  # DequantizeLinear wants them alike
        return False
    bias = _bias_of(node)
    return bias is None or constant(bias) is not None


def in_floats(
    node: ir.Node,
    find_site: Callable[[ir.Node], Site | None],
    *,
    axis: int = 1,
    without: Collection[str] = (),
) -> Site:
    """Put the operator in floating point in the place of one that `has_floats`.

    Args:
        node: The operator; it leaves the graph.
        find_site: Gives the site of the operator in floating point.
        axis: The one along which its weight may have several scales.
        without: The attributes that the operator in floating point does not have.

    Returns:
        The site.
    """
    index = _SCALES_OF_OUTPUTS[node.op_type]
    inputs = inputs_of(node, 9)
    y_scale, y_zero = inputs[index : index + 2]
    (quantized,) = node.outputs
    float32 = [ir.DataType.FLOAT]
    rewrite = Rewrite(node)
    (x,) = rewrite.add("x", "DequantizeLinear", inputs[:3], float32)
    x.shape = inputs[0].shape if inputs[0] is not None else None
    (weight,) = rewrite.add("weight", "DequantizeLinear", inputs[3:6], float32, {"axis": axis})
    given = [x, weight]
    if _bias_of(node) is not None:
        given.append(rewrite.constant("bias", _float_bias(node)))
    operator = _FLOATS[node.op_type]
    attributes = {name: each for name, each in node.attributes.items() if name not in without}
    (y,) = rewrite.add(operator, operator, given, float32, attributes)
    y.shape = quantized.shape
    stored = (y_zero.dtype if y_zero is not None else quantized.dtype) or ir.DataType.UINT8
    rewrite.replace(rewrite.add("quantized", "QuantizeLinear", [y, y_scale, y_zero], [stored]))
    product = y.producer()
    site = find_site(product) if product is not None else None
    assert site is not None
    return site


def _bias_of(node: ir.Node) -> ir.Value | None:
    return inputs_of(node, 9)[_BIASES[node.op_type]] if node.op_type in _BIASES else None


def _float_bias(node: ir.Node) -> np.ndarray:
    """Return what the operator adds: integers of the product's own scale."""
    x_scale, scale, bias = map(constant, (node.inputs[1], node.inputs[4], _bias_of(node)))
    assert x_scale is not None
    assert scale is not None
    assert bias is not None
    alpha = node.attributes.get_float("alpha", 1.0)
    both = alpha * x_scale.array().astype(np.float64).reshape(()) * scale.array()
    floats: np.ndarray = (bias.array() * both).astype(np.float32)
    return floats
