"""``MatMul`` with a constant second factor ``[in, out]``, quantized and dequantized or not."""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.graph.constants import constant
from converters.onnx.graph.matrix_site import matrix_site
from converters.onnx.graph.quantized_values import rounded, unrounded
from converters.onnx.graph.site import Site


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the weight is no constant matrix."""
    x = node.inputs[0]
    weight = constant(node.inputs[1])
    if x is None or weight is None or constant(x) is not None:
        return None
    if len(weight.shape) != 2 or not weight.dtype.is_floating_point():
        return None
    return matrix_site(node, unrounded(x), rounded(node.outputs[0]), weight)
