"""``com.microsoft.DynamicQuantizeMatMul``: floats times 8-bit weights ``[in, out]``.

``y = x W + bias`` with ``W = (B - b_zero_point) * b_scale``, the activation rounded to 8 bits on
the way. Source: ONNX Runtime's ContribOperators documentation.
"""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.graph.constant_numbers import dequantized
from converters.onnx.graph.constants import constant
from converters.onnx.graph.site import Site


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the weight is no constant matrix."""
    x, weight, scale = node.inputs[0], constant(node.inputs[1]), constant(node.inputs[2])
    given = node.inputs[3] if len(node.inputs) > 3 else None
    zero = constant(given)
    bias = node.inputs[4] if len(node.inputs) > 4 else None
    if x is None or weight is None or scale is None or len(weight.shape) != 2:
        return None
    if given is not None and zero is None:
        return None
    return Site(
        node=node,
        x=x,
        y=node.outputs[0],
        in_features=weight.shape[0],
        out_features=weight.shape[1],
        dtype=scale.dtype,
        weight=lambda: dequantized(weight.array(), scale.array(), zero.array() if zero else None),
        quantized=True,
        added=4 if bias is not None else None,
    )
