"""``com.microsoft.QGemm``: ``Gemm`` of 8-bit integers with a constant weight, either way round.

``y = alpha * a_scale * b_scale * (A - a_zero_point) (B - b_zero_point) + c``, as integers where
it has an output scale. Source: ONNX Runtime's ContribOperators documentation.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.constants import constant
from converters.onnx.graph.integer_weight import integer_matrix
from converters.onnx.graph.product_in_floats import cuts_its_product_off, has_floats, in_floats
from converters.onnx.graph.quantized_ports import float_input, float_output
from converters.onnx.graph.site import Site, inputs_of
from converters.onnx.operators import gemm


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where ``x`` is transposed or the weight no constant."""
    a, _, _, b, b_scale, b_zero, bias, y_scale, y_zero = inputs_of(node, 9)
    weight = integer_matrix(b, constant(b_scale), b_zero)
    if a is None or weight is None:
        return None
    cut_off = cuts_its_product_off(node)
    if cut_off and not has_floats(node):
        return None
    if node.attributes.get_int("transA", 0):
        return None
    transposed = bool(node.attributes.get_int("transB", 0))
    rows, columns = reversed(weight.shape) if transposed else weight.shape

    def stored_as_in_out() -> np.ndarray:
        return weight.floats(axis=0).T if transposed else weight.floats()

    def expose() -> Site:
        if cut_off:
            return in_floats(node, gemm.find_site, axis=0 if transposed else 1)
        x, y = float_input(node, 0, weight.dtype), node.outputs[0]
        if y_scale is not None:
            y = float_output(node, y_scale, y_zero, weight.dtype)
        return replace(site, x=x, y=y, expose=None)

    site = Site(
        node=node,
        x=a,
        y=node.outputs[0],
        in_features=rows,
        out_features=columns,
        dtype=weight.dtype,
        weight=stored_as_in_out,
        alpha=node.attributes.get_float("alpha", 1.0),
        quantized=True,
        bias_is_fixed=bias is not None and not cut_off,
        expose=expose,
    )
    return site
