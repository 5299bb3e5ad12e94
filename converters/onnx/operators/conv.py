"""``Conv`` of one to three dimensions with a constant kernel."""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.graph.constants import constant
from converters.onnx.graph.quantized_values import rounded, unrounded
from converters.onnx.graph.site import Site
from loraport.adapter import ModuleKind


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the kernel is no constant or has other dimensions."""
    x, kernel = node.inputs[0], constant(node.inputs[1])
    if x is None or kernel is None or constant(x) is not None:
        return None
    shape = kernel.shape
    if len(shape) not in (3, 4, 5) or not kernel.dtype.is_floating_point():
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    groups = node.attributes.get_int("group", 1)
    return Site(
        node=node,
        x=unrounded(x),
        y=rounded(node.outputs[0]),
        in_features=shape[1] * groups,
        out_features=shape[0],
        dtype=kernel.dtype,
        weight=lambda: kernel.array().reshape(shape[0], -1).T,
        kind=ModuleKind.CONV,
        kernel=tuple(shape[2:]),
        groups=groups,
        added=2 if bias is not None else None,
        quantized=kernel.quantized,
    )
