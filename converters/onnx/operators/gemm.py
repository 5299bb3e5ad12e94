"""``Gemm``: ``y = alpha * x W + beta * c`` with a constant weight, stored either way round."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from converters.onnx.site import Site


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where ``x`` is transposed or the weight no constant floats."""
    x, weight = node.inputs[0], node.inputs[1]
    if x is None or weight is None or weight.const_value is None or x.const_value is not None:
        return None
    tensor = weight.const_value
    if node.attributes.get_int("transA", 0) or not tensor.dtype.is_floating_point():
        return None
    transposed = bool(node.attributes.get_int("transB", 0))
    alpha = node.attributes.get_float("alpha", 1.0)
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    separable = (
        bias is not None
        and bias.const_value is not None
        and bias.shape is not None
        and len(bias.shape) == 1
        and node.attributes.get_float("beta", 1.0) == 1.0
    )
    rows, columns = tensor.shape.numpy()
    if transposed:
        rows, columns = columns, rows

    def stored_as_in_out() -> np.ndarray:
        array = tensor.numpy().T if transposed else tensor.numpy()
        return array if alpha == 1.0 else array * np.asarray(alpha, array.dtype)

    return Site(
        node=node,
        x=x,
        y=node.outputs[0],
        in_features=rows,
        out_features=columns,
        dtype=tensor.dtype,
        weight=stored_as_in_out,
        bias_input=2 if separable else None,
        bias_is_fixed=bias is not None and not separable,
    )
