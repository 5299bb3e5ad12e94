"""``Gather`` of rows of a constant matrix: an embedding."""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.constants import constant
from converters.onnx.site import Site
from loraport.adapter import ModuleKind


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where no rows of a constant matrix of floats are gathered."""
    table, tokens = node.inputs
    rows_of = constant(table)
    if tokens is None or rows_of is None or len(rows_of.shape) != 2:
        return None
    if not rows_of.dtype.is_floating_point():
        return None
    if node.attributes.get_int("axis", 0) != 0 or constant(tokens) is not None:
        return None
    rows, columns = rows_of.shape
    return Site(
        node=node,
        x=tokens,
        y=node.outputs[0],
        in_features=rows,
        out_features=columns,
        dtype=rows_of.dtype,
        weight=rows_of.array,
        quantized=rows_of.quantized,
        kind=ModuleKind.EMBEDDING,
    )
