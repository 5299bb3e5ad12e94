"""``MatMulInteger`` between what quantizes and the scales: what quantizers write.

``DynamicQuantizeLinear(x) -> MatMulInteger(., B) -> Cast -> Mul(x_scale * b_scale) -> y``, so that
``y = x W`` with ``W = (B - b_zero_point) * b_scale``, maybe with a bias of integers added before
the ``Cast``. Where ``QuantizeLinear`` has cut off what is below zero, as a folded ``Relu`` would, a
slot reads what it left.
"""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.graph.integer_weight import integer_matrix
from converters.onnx.graph.quantized_ports import reading_floats
from converters.onnx.graph.scaled_product import scaled_product
from converters.onnx.graph.site import Site, inputs_of


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the operator stands in another chain."""
    a, b, a_zero, b_zero = inputs_of(node, 4)
    product = scaled_product(node)
    if a is None or product is None:
        return None
    weight = integer_matrix(b, product.scale, b_zero)
    if weight is None:
        return None
    site = Site(
        node=node,
        x=a,
        y=product.y,
        in_features=weight.shape[0],
        out_features=weight.shape[1],
        dtype=weight.dtype,
        weight=weight.floats,
        quantized=True,
        bias_is_fixed=product.biased,
    )
    return reading_floats(site, a, product.x_scale, a_zero)
