"""``com.microsoft.Attention``: the packed projection of queries, keys and values inside it.

A slot takes the projection out: ``x W`` becomes a ``MatMul``, the rest ``MultiHeadAttention``.
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
from converters.onnx.graph.quantized_values import unrounded
from converters.onnx.graph.rewriting import Rewrite
from converters.onnx.graph.site import Site, inputs_of


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the weight is no constant or the rest is unusual."""
    x, weight, bias, mask, past, scores_bias, past_length = inputs_of(node, 7)
    found = constant(weight)
    if x is None or weight is None or found is None or past_length is not None:
        return None
    if len(found.shape) != 2 or not found.dtype.is_floating_point():
        return None
    sizes = hidden_sizes(node, found.shape[1])
    if sum(sizes) != found.shape[1] or not can_be_taken_apart(node, mask):
        return None

    def expose() -> Site:
        rewrite = Rewrite(node)
        y = rewrite.add("qkv/MatMul", "MatMul", [x, weight], [found.dtype])[0]
        inputs = AttentionInputs(bias, mask, past, scores_bias)
        take_apart(rewrite, node, y, sizes, inputs, found.dtype)
        projection = y.producer()
        assert projection is not None
        return replace(site, node=projection, y=y, expose=None)

    site = Site(
        node=node,
        x=unrounded(x),
        y=node.outputs[0],
        in_features=found.shape[0],
        out_features=found.shape[1],
        dtype=found.dtype,
        weight=found.array,
        quantized=found.quantized,
        expose=expose,
    )
    return site
