"""``com.microsoft.MatMulNBits``: a block-quantized weight ``[N, K]`` with scales."""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.site import Site


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the scales' type is unknown."""
    x, scales = node.inputs[0], node.inputs[2]
    if x is None or scales is None or scales.dtype is None:
        return None
    return Site(
        node=node,
        x=x,
        y=node.outputs[0],
        in_features=int(node.attributes.get_int("K", 0)),
        out_features=int(node.attributes.get_int("N", 0)),
        dtype=scales.dtype,
    )
