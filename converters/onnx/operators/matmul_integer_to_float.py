"""``com.microsoft.MatMulIntegerToFloat``: 8-bit factors, the scales and a bias in one operator.

``y = (A - a_zero_point) (B - b_zero_point) * a_scale * b_scale + bias``. Source: ONNX Runtime's
ContribOperators documentation.
"""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.graph.constants import constant
from converters.onnx.graph.integer_weight import integer_matrix
from converters.onnx.graph.quantized_values import quantized_from
from converters.onnx.graph.site import Site, inputs_of


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the weight is no constant or nothing was quantized."""
    a, b, _, b_scale, _, b_zero, bias = inputs_of(node, 7)
    x, weight = quantized_from(a), integer_matrix(b, constant(b_scale), b_zero)
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
        added=6 if bias is not None else None,
    )
