"""``MatMul`` with a constant second factor ``[in, out]``, quantized and dequantized or not.

The factor may be ``[1, in, out]``, as a batch of one, where its other factor is no matrix: the
product of a matrix has a dimension more than that, which a slot's has not.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from converters.onnx.graph.constant_value import Constant
from converters.onnx.graph.constants import constant
from converters.onnx.graph.matrix_site import matrix_site
from converters.onnx.graph.quantized_values import rounded, unrounded
from converters.onnx.graph.site import Site


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the weight is no constant matrix."""
    given = node.inputs[0]
    weight = constant(node.inputs[1])
    if given is None or weight is None or constant(given) is not None:
        return None
    x = unrounded(given)
    if x.shape is None or len(x.shape) != 2:
        weight = _only_matrix(weight)
    if len(weight.shape) != 2 or not weight.dtype.is_floating_point():
        return None
    return matrix_site(node, x, rounded(node.outputs[0]), weight)


def _only_matrix(weight: Constant) -> Constant:
    """Return the matrix that is a constant's only one."""
    if len(weight.shape) != 3 or weight.shape[0] != 1:
        return weight
    return replace(weight, shape=weight.shape[1:], array=lambda: weight.array()[0])
