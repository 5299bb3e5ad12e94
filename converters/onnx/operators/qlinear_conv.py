"""``QLinearConv`` of one to three dimensions with a constant kernel: 8-bit integers in and out.

A slot reads and writes floating point beside it, see `converters.onnx.graph.quantized_ports`.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from converters.onnx.graph.constants import constant
from converters.onnx.graph.integer_weight import integer_kernel
from converters.onnx.graph.product_in_floats import cuts_its_product_off, has_floats, in_floats
from converters.onnx.graph.quantized_ports import float_input, float_output
from converters.onnx.graph.site import Site, inputs_of
from converters.onnx.operators import conv
from loraport.adapter import ModuleKind


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the kernel is no constant or has other dimensions."""
    a, _, _, w, w_scale, w_zero, y_scale, y_zero, bias = inputs_of(node, 9)
    kernel = integer_kernel(w, constant(w_scale), w_zero)
    if a is None or kernel is None or y_scale is None:
        return None
    cut_off = cuts_its_product_off(node)
    if cut_off and not has_floats(node):
        return None
    if node.attributes.get_int("channels_last", 0):
        return None
    shape = kernel.shape
    groups = node.attributes.get_int("group", 1)

    def expose() -> Site:
        if cut_off:
            return in_floats(node, conv.find_site, axis=0, without=("channels_last",))
        x = float_input(node, 0, kernel.dtype)
        y = float_output(node, y_scale, y_zero, kernel.dtype)
        return replace(site, x=x, y=y, expose=None)

    site = Site(
        node=node,
        x=a,
        y=node.outputs[0],
        in_features=shape[1] * groups,
        out_features=shape[0],
        dtype=kernel.dtype,
        weight=lambda: kernel.floats(axis=0).reshape(shape[0], -1).T,
        quantized=True,
        kind=ModuleKind.CONV,
        kernel=tuple(shape[2:]),
        groups=groups,
        bias_is_fixed=bias is not None and not cut_off,
        expose=expose,
    )
    return site
