"""``MatMul`` with a constant second factor ``[in, out]``."""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.site import Site


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the weight is no constant matrix."""
    x, weight = node.inputs
    if x is None or weight is None or weight.const_value is None or x.const_value is not None:
        return None
    tensor = weight.const_value
    if len(tensor.shape) != 2 or not tensor.dtype.is_floating_point():
        return None
    rows, columns = tensor.shape.numpy()
    return Site(
        node=node,
        x=x,
        y=node.outputs[0],
        in_features=rows,
        out_features=columns,
        dtype=tensor.dtype,
        weight=tensor.numpy,
    )
