"""``MatMulInteger`` between ``DynamicQuantizeLinear`` and the scales: what quantizers write.

``DynamicQuantizeLinear(x) -> MatMulInteger(., B) -> Cast -> Mul(x_scale * b_scale) -> y``, so that
``y = x W`` with ``W = (B - b_zero_point) * b_scale``, maybe with a bias of integers added before
the ``Cast``.
"""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.graph.integer_weight import integer_matrix
from converters.onnx.graph.quantized_values import quantized_from, scaled_product
from converters.onnx.graph.site import Site, inputs_of


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the operator stands in another chain."""
    a, b, _, b_zero = inputs_of(node, 4)
    x, product = quantized_from(a), scaled_product(node)
    if x is None or product is None:
        return None
    weight = integer_matrix(b, product.scale, b_zero)
    if weight is None:
        return None
    return Site(
        node=node,
        x=x,
        y=product.y,
        in_features=weight.shape[0],
        out_features=weight.shape[1],
        dtype=weight.dtype,
        weight=weight.floats,
        quantized=True,
        bias_is_fixed=product.biased,
    )
