"""``Gemm``: ``y = alpha * x W + beta * c`` with a constant weight, stored either way round."""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from converters.onnx.graph.constants import constant
from converters.onnx.graph.matrix_site import matrix_site
from converters.onnx.graph.quantized_values import rounded, unrounded
from converters.onnx.graph.site import Site


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where ``x`` is transposed or the weight no constant floats."""
    x = node.inputs[0]
    weight = constant(node.inputs[1])
    if x is None or weight is None or constant(x) is not None:
        return None
    if node.attributes.get_int("transA", 0) or not weight.dtype.is_floating_point():
        return None
    if len(weight.shape) != 2:
        return None
    transposed = bool(node.attributes.get_int("transB", 0))
    alpha = node.attributes.get_float("alpha", 1.0)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    site = matrix_site(
        node, unrounded(x), rounded(node.outputs[0]), weight, transposed=transposed, alpha=alpha
    )
    return replace(
        site,
        added=2 if bias is not None else None,
        added_scale=node.attributes.get_float("beta", 1.0),
    )
