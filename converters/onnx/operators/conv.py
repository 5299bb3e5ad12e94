"""``Conv`` of one or two dimensions with a constant kernel."""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.site import Site
from loraport.adapter import ModuleKind


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the kernel is no constant or has other dimensions."""
    x, kernel = node.inputs[0], node.inputs[1]
    if x is None or kernel is None or kernel.const_value is None or x.const_value is not None:
        return None
    tensor = kernel.const_value
    shape = tensor.shape.numpy()
    if len(shape) not in (3, 4) or not tensor.dtype.is_floating_point():
        return None
    bias = node.inputs[2] if len(node.inputs) > 2 else None
    groups = node.attributes.get_int("group", 1)
    return Site(
        node=node,
        x=x,
        y=node.outputs[0],
        in_features=shape[1] * groups,
        out_features=shape[0],
        dtype=tensor.dtype,
        weight=lambda: tensor.numpy().reshape(shape[0], -1).T,
        kind=ModuleKind.CONV,
        kernel=tuple(shape[2:]),
        groups=groups,
        bias_input=2 if bias is not None and bias.const_value is not None else None,
        bias_is_fixed=bias is not None and bias.const_value is None,
    )
