"""``com.microsoft.FusedMatMul``: ``y = alpha * x W``, the weight stored either way round.

ONNX Runtime's optimizer also writes it of a ``Transpose`` and the product: where a convolution's
channels become features, say. A slot turns what it reads by itself then.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from converters.onnx.graph.constants import constant
from converters.onnx.graph.matrix_site import matrix_site
from converters.onnx.graph.rewriting import Rewrite, opset_of
from converters.onnx.graph.site import Site

_HAS_EINSUM = 12  # this opset and later


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where a matrix ``x`` is transposed or the weight no constant."""
    x, weight = node.inputs[0], constant(node.inputs[1])
    if x is None or weight is None or constant(x) is not None or len(weight.shape) != 2:
        return None
    if any(node.attributes.get_int(name, 0) for name in ("transBatchA", "transBatchB")):
        return None
    if not weight.dtype.is_floating_point():
        return None
    transposed = bool(node.attributes.get_int("transB", 0))
    alpha = node.attributes.get_float("alpha", 1.0)
    site = matrix_site(node, x, node.outputs[0], weight, transposed=transposed, alpha=alpha)
    if not node.attributes.get_int("transA", 0):
        return site
    if (x.shape is not None and len(x.shape) == 2) or opset_of(node) < _HAS_EINSUM:
        return None

    def expose() -> Site:
        """Give the slot ``x`` as ``[..., rows, in]``, whatever its rank; it is mostly unknown."""
        rewrite = Rewrite(node)
        attributes = {"equation": "...ij->...ji"}
        (turned,) = rewrite.add("turned", "Einsum", [x], [site.dtype], attributes)
        rewrite.put_before()
        return replace(site, x=turned, expose=None)

    return replace(site, expose=expose)
