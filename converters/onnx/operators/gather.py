"""``Gather`` of rows of a constant matrix: an embedding; of integers that are dequantized after."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.constants import Constant, constant, dequantized
from converters.onnx.graph.quantized_values import only_reader, rounded
from converters.onnx.graph.site import Site
from loraport.adapter import ModuleKind


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where no rows of a constant matrix of floats are gathered."""
    table, tokens = node.inputs
    rows_of = constant(table)
    if tokens is None or rows_of is None or len(rows_of.shape) != 2:
        return None
    if node.attributes.get_int("axis", 0) != 0 or constant(tokens) is not None:
        return None
    rows, columns = rows_of.shape
    site = Site(
        node=node,
        x=tokens,
        y=rounded(node.outputs[0]),
        in_features=rows,
        out_features=columns,
        dtype=rows_of.dtype,
        weight=rows_of.array,
        quantized=rows_of.quantized,
        kind=ModuleKind.EMBEDDING,
    )
    return site if rows_of.dtype.is_floating_point() else _of_integers(site, rows_of)


def _of_integers(site: Site, table: Constant) -> Site | None:
    """Return the site where the rows are dequantized next, by one scale for all."""
    after = only_reader(site.node.outputs[0])
    if after is None or after.op_type != "DequantizeLinear":
        return None
    scale = constant(after.inputs[1])
    given = after.inputs[2] if len(after.inputs) > 2 else None
    zero = constant(given)
    if scale is None or (given is not None and zero is None):
        return None
    if any(length != 1 for known in (scale, zero) if known for length in known.shape):
        return None
    return replace(
        site,
        y=rounded(after.outputs[0]),
        dtype=scale.dtype,
        weight=_weight(table, scale, zero),
        quantized=True,
    )


def _weight(table: Constant, scale: Constant, zero: Constant | None) -> Callable[[], np.ndarray]:
    return lambda: dequantized(table.array(), scale.array(), zero.array() if zero else None)
