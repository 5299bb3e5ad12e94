"""``com.microsoft.DynamicQuantizeMatMul``: floats times 8-bit weights ``[in, out]``.

``y = x W + bias`` with ``W = (B - b_zero_point) * b_scale``, the activation rounded to 8 bits on
the way. Source: ONNX Runtime's ContribOperators documentation.
"""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.graph.constants import constant
from converters.onnx.graph.integer_weight import integer_matrix
from converters.onnx.graph.site import Site, inputs_of


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the weight is no constant matrix."""
    x, b, b_scale, b_zero, bias = inputs_of(node, 5)
    weight = integer_matrix(b, constant(b_scale), b_zero)
    if x is None or weight is None:
        return None
    return Site(
        node=node,
        x=x,
        y=node.outputs[0],
        in_features=weight.shape[0],
        out_features=weight.shape[1],
        dtype=weight.dtype,
        weight=weight.floats,
        quantized=True,
        added=4 if bias is not None else None,
    )
