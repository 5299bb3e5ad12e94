"""``ConvInteger`` between what quantizes and the scales: what quantizers write.

``DynamicQuantizeLinear(x) -> ConvInteger(., W) -> Cast -> Mul(x_scale * w_scale) -> y``, maybe with
a bias of integers added before the ``Cast``. Where ``QuantizeLinear`` has cut off what is below
zero, as a folded ``Relu`` would, a slot reads what it left.
"""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.graph.integer_weight import integer_kernel
from converters.onnx.graph.quantized_ports import reading_floats
from converters.onnx.graph.scaled_product import scaled_product
from converters.onnx.graph.site import Site, inputs_of
from loraport.adapter import ModuleKind


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the operator stands in another chain."""
    x, w, x_zero, w_zero = inputs_of(node, 4)
    product = scaled_product(node)
    if x is None or product is None:
        return None
    kernel = integer_kernel(w, product.scale, w_zero)
    if kernel is None:
        return None
    shape = kernel.shape
    groups = node.attributes.get_int("group", 1)
    site = Site(
        node=node,
        x=x,
        y=product.y,
        in_features=shape[1] * groups,
        out_features=shape[0],
        dtype=kernel.dtype,
        weight=lambda: kernel.floats(axis=0).reshape(shape[0], -1).T,
        quantized=True,
        kind=ModuleKind.CONV,
        kernel=tuple(shape[2:]),
        groups=groups,
        bias_is_fixed=product.biased,
    )
    return reading_floats(site, x, product.x_scale, x_zero)
