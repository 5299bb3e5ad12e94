"""``com.microsoft.QAttention``: ``Attention`` whose projection is in 8 bits.

``x W`` with ``x = (X - x_zero_point) * x_scale`` and ``W = (B - b_zero_point) * b_scale``. A slot
takes the projection out as ``MatMulInteger`` of the same integers and leaves
``MultiHeadAttention``.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from converters.onnx.graph.attention_core import (
    AttentionInputs,
    can_be_taken_apart,
    hidden_sizes,
    take_apart,
)
from converters.onnx.graph.constants import constant
from converters.onnx.graph.integer_weight import integer_matrix
from converters.onnx.graph.quantized_ports import as_floats
from converters.onnx.graph.quantized_values import quantized_from
from converters.onnx.graph.rewriting import Rewrite
from converters.onnx.graph.site import Site, inputs_of


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the weight is no constant or the rest is unusual."""
    x, weight, bias, x_scale, b_scale, mask, x_zero, b_zero, past = inputs_of(node, 9)
    found = integer_matrix(weight, constant(b_scale), b_zero)
    if x is None or found is None:
        return None
    sizes = hidden_sizes(node, found.shape[1])
    if sum(sizes) != found.shape[1] or not can_be_taken_apart(node, mask):
        return None

    def expose() -> Site:
        source = as_floats(node, x, x_scale, x_zero, found.dtype)
        rewrite = Rewrite(node)
        integers = [x, weight, x_zero, b_zero]
        while integers[-1] is None:
            integers.pop()
        product = rewrite.add("qkv/MatMul", "MatMulInteger", integers, [ir.DataType.INT32])[0]
        cast = rewrite.add("qkv/Cast", "Cast", [product], [found.dtype], {"to": int(found.dtype)})
        both = rewrite.add("qkv/scale", "Mul", [x_scale, b_scale], [found.dtype])
        y = rewrite.add("qkv/scaled", "Mul", [cast[0], both[0]], [found.dtype])[0]
        inputs = AttentionInputs(bias, mask, past, None)
        take_apart(rewrite, node, y, sizes, inputs, found.dtype)
        projection = product.producer()
        assert projection is not None
        return replace(site, node=projection, x=source, y=y, expose=None)

    site = Site(
        node=node,
        x=quantized_from(x) or x,
        y=node.outputs[0],
        in_features=found.shape[0],
        out_features=found.shape[1],
        dtype=found.dtype,
        weight=found.floats,
        quantized=True,
        expose=expose,
    )
    return site
