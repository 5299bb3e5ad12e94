"""``ConvInteger`` between ``DynamicQuantizeLinear`` and the scales: what quantizers write.

``DynamicQuantizeLinear(x) -> ConvInteger(., W) -> Cast -> Mul(x_scale * w_scale) -> y``, maybe with
a bias of integers added before the ``Cast``.
"""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.graph.constant_numbers import dequantized
from converters.onnx.graph.constants import constant
from converters.onnx.graph.quantized_values import quantized_from, scaled_product
from converters.onnx.graph.site import Site, inputs_of
from loraport.adapter import ModuleKind


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the operator stands in another chain."""
    x, w, _, given = inputs_of(node, 4)
    source, kernel, zero = quantized_from(x), constant(w), constant(given)
    product = scaled_product(node)
    if source is None or kernel is None or product is None or len(kernel.shape) not in (3, 4, 5):
        return None
    if given is not None and zero is None:
        return None
    scale = product.scale
    shape = kernel.shape
    groups = node.attributes.get_int("group", 1)
    return Site(
        node=node,
        x=source,
        y=product.y,
        in_features=shape[1] * groups,
        out_features=shape[0],
        dtype=scale.dtype,
        weight=lambda: (
            dequantized(
                kernel.array(), scale.array().reshape(-1), zero.array() if zero else None, axis=0
            )
            .reshape(shape[0], -1)
            .T
        ),
        quantized=True,
        kind=ModuleKind.CONV,
        kernel=tuple(shape[2:]),
        groups=groups,
        bias_is_fixed=product.biased,
    )
