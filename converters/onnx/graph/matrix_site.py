"""The site of a product with a constant matrix, stored either way round."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.constant_value import Constant
from converters.onnx.graph.site import Site


def matrix_site(
    node: ir.Node,
    x: ir.Value,
    y: ir.Value,
    weight: Constant,
    *,
    transposed: bool = False,
    alpha: float = 1.0,
) -> Site:
    """Return the site of ``y = alpha * x W``.

    Args:
        node: The operator.
        x: ``[..., in]``.
        y: ``[..., out]``.
        weight: ``[in, out]``.
        transposed: It is stored ``[out, in]``.
        alpha: A factor of the product; no part of the weight.
    """
    rows, columns = reversed(weight.shape) if transposed else weight.shape

    def stored_as_in_out() -> np.ndarray:
        return weight.array().T if transposed else weight.array()

    return Site(
        node=node,
        x=x,
        y=y,
        in_features=rows,
        out_features=columns,
        dtype=weight.dtype,
        weight=stored_as_in_out,
        quantized=weight.quantized,
        alpha=alpha,
    )
