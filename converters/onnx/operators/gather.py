"""``Gather`` of rows of a constant matrix: an embedding."""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.site import Site
from loraport.adapter import ModuleKind


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where no rows of a constant matrix of floats are gathered."""
    table, tokens = node.inputs
    if table is None or tokens is None or table.const_value is None:
        return None
    tensor = table.const_value
    if len(tensor.shape) != 2 or not tensor.dtype.is_floating_point():
        return None
    if node.attributes.get_int("axis", 0) != 0 or tokens.const_value is not None:
        return None
    rows, columns = tensor.shape.numpy()
    return Site(
        node=node,
        x=tokens,
        y=node.outputs[0],
        in_features=rows,
        out_features=columns,
        dtype=tensor.dtype,
        weight=tensor.numpy,
        kind=ModuleKind.EMBEDDING,
    )
