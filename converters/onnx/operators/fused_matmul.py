"""``com.microsoft.FusedMatMul``: ``y = alpha * x W``, the weight stored either way round."""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.graph.constants import constant
from converters.onnx.graph.matrix_site import matrix_site
from converters.onnx.graph.site import Site


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where ``x`` is transposed or the weight no constant matrix."""
    x, weight = node.inputs[0], constant(node.inputs[1])
    if x is None or weight is None or constant(x) is not None or len(weight.shape) != 2:
        return None
    if any(node.attributes.get_int(name, 0) for name in ("transA", "transBatchA", "transBatchB")):
        return None
    if not weight.dtype.is_floating_point():
        return None
    transposed = bool(node.attributes.get_int("transB", 0))
    alpha = node.attributes.get_float("alpha", 1.0)
    return matrix_site(node, x, node.outputs[0], weight, transposed=transposed, alpha=alpha)
