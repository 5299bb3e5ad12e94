"""``MatMulInteger`` between ``DynamicQuantizeLinear`` and the scales: what quantizers write.

``DynamicQuantizeLinear(x) -> MatMulInteger(., B) -> Cast -> Mul(x_scale * b_scale) -> y``, so that
``y = x W`` with ``W = (B - b_zero_point) * b_scale``, maybe with a bias of integers added before
the ``Cast``.
"""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.graph.constant_numbers import dequantized
from converters.onnx.graph.constants import constant
from converters.onnx.graph.quantized_values import quantized_from, scaled_product
from converters.onnx.graph.site import Site


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the operator stands in another chain."""
    weight = constant(node.inputs[1])
    x = quantized_from(node.inputs[0])
    given = node.inputs[3] if len(node.inputs) > 3 else None
    zero = constant(given)
    if x is None or weight is None or len(weight.shape) != 2 or (given is not None and not zero):
        return None
    product = scaled_product(node)
    if product is None:
        return None
    scale = product.scale
    return Site(
        node=node,
        x=x,
        y=product.y,
        in_features=weight.shape[0],
        out_features=weight.shape[1],
        dtype=scale.dtype,
        weight=lambda: dequantized(weight.array(), scale.array(), zero.array() if zero else None),
        quantized=True,
        bias_is_fixed=product.biased,
    )
