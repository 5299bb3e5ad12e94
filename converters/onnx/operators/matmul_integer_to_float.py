"""``com.microsoft.MatMulIntegerToFloat``: 8-bit factors, the scales and a bias in one operator.

``y = (A - a_zero_point) (B - b_zero_point) * a_scale * b_scale + bias``. Source: ONNX Runtime's
ContribOperators documentation.
"""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.graph.constants import constant
from converters.onnx.graph.integer_weight import integer_matrix
from converters.onnx.graph.quantized_ports import reading_floats
from converters.onnx.graph.site import Site, inputs_of


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the weight is no constant."""
    a, b, a_scale, b_scale, a_zero, b_zero, bias = inputs_of(node, 7)
    weight = integer_matrix(b, constant(b_scale), b_zero)
    if a is None or weight is None or constant(a) is not None:
        return None
    site = Site(
        node=node,
        x=a,
        y=node.outputs[0],
        in_features=weight.shape[0],
        out_features=weight.shape[1],
        dtype=weight.dtype,
        weight=weight.floats,
        quantized=True,
        added=6 if bias is not None else None,
    )
    return reading_floats(site, a, a_scale, a_zero)
