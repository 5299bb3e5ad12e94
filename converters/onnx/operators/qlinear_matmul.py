"""``QLinearMatMul`` with a constant second factor: 8-bit integers in and out.

``W = (b - b_zero_point) * b_scale``. A slot reads and writes floating point beside it, see
`converters.onnx.graph.quantized_ports`.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from converters.onnx.graph.constants import constant
from converters.onnx.graph.integer_weight import integer_matrix
from converters.onnx.graph.product_in_floats import cuts_its_product_off, has_floats, in_floats
from converters.onnx.graph.quantized_ports import float_input, float_output
from converters.onnx.graph.site import Site, inputs_of
from converters.onnx.operators import matmul


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the weight is no constant matrix."""
    a, _, _, b, b_scale, b_zero, y_scale, y_zero = inputs_of(node, 8)
    weight = integer_matrix(b, constant(b_scale), b_zero)
    if a is None or weight is None or y_scale is None or constant(a) is not None:
        return None
    cut_off = cuts_its_product_off(node)
    if cut_off and not has_floats(node):
        return None

    def expose() -> Site:
        if cut_off:
            return in_floats(node, matmul.find_site)
        x = float_input(node, 0, weight.dtype)
        y = float_output(node, y_scale, y_zero, weight.dtype)
        return replace(site, x=x, y=y, expose=None)

    site = Site(
        node=node,
        x=a,
        y=node.outputs[0],
        in_features=weight.shape[0],
        out_features=weight.shape[1],
        dtype=weight.dtype,
        weight=weight.floats,
        quantized=True,
        expose=expose,
    )
    return site
