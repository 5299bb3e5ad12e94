"""``MatMulInteger`` between ``DynamicQuantizeLinear`` and the scales: what quantizers write.

``DynamicQuantizeLinear(x) -> MatMulInteger(., B) -> Cast -> Mul(x_scale * b_scale) -> y``, so that
``y = x W`` with ``W = (B - b_zero_point) * b_scale``.
"""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.constants import Constant, constant, dequantized
from converters.onnx.quantized_values import only_reader, quantized_from
from converters.onnx.site import Site


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the operator stands in another chain."""
    weight = constant(node.inputs[1])
    x = quantized_from(node.inputs[0])
    given = node.inputs[3] if len(node.inputs) > 3 else None
    zero = constant(given)
    if x is None or weight is None or len(weight.shape) != 2 or (given is not None and not zero):
        return None
    cast = only_reader(node.outputs[0])
    if cast is None or cast.op_type != "Cast":
        return None
    scaled = only_reader(cast.outputs[0])
    if scaled is None or scaled.op_type != "Mul":
        return None
    scale = _weight_scale(scaled, cast.outputs[0])
    if scale is None:
        return None
    return Site(
        node=node,
        x=x,
        y=scaled.outputs[0],
        in_features=weight.shape[0],
        out_features=weight.shape[1],
        dtype=scale.dtype,
        weight=lambda: dequantized(weight.array(), scale.array(), zero.array() if zero else None),
        quantized=True,
    )


def _weight_scale(scaled: ir.Node, product: ir.Value) -> Constant | None:
    """Return the constant factor of the two scales that the product is multiplied with."""
    factors = [value for value in scaled.inputs if value is not product]
    both = factors[0].producer() if len(factors) == 1 and factors[0] is not None else None
    if both is None or both.op_type != "Mul":
        return None
    return next((found for value in both.inputs if (found := constant(value)) is not None), None)
