"""Weights that a graph computes from others, stored as they reach their products.

A product's matrix may be put together (``Concat``), taken apart (``Split``, ``Slice``) or only
given other dimensions (``Reshape``) or another type (``Cast``). ONNX Runtime's quantizers look
for initializers and leave such a one as it is.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.constants import constant

_PRODUCTS = ("MatMul", "Gemm", "Attention")
_TURNED_LATER = ("Transpose", "Identity")  # see `plain_weights`


def store_computed_weights(model: ir.Model) -> None:
    """Make initializers of the main graph's computed matrices, in place.

    What only turns a stored matrix stays; dequantized ones do, too.

    Args:
        model: A model with its weights in memory.
    """
    for node in list(model.graph.all_nodes()):
        if node.op_type in _PRODUCTS and len(node.inputs) > 1:
            _store(model.graph, node.inputs[1])


def _store(graph: ir.Graph, value: ir.Value | None) -> None:
    while value is not None and (node := value.producer()) and node.op_type in _TURNED_LATER:
        value = node.inputs[0]
    if value is None or value.is_graph_output():
        return
    node = value.producer()
    found = constant(value)
    if node is None or node.graph is not graph or node.op_type == "Constant" or found is None:
        return
    if len(found.shape) != 2 or found.dtype is not ir.DataType.FLOAT or found.quantized:
        return
    tensor = ir.tensor(np.ascontiguousarray(found.array()))
    shape, element = ir.Shape(found.shape), ir.TensorType(tensor.dtype)
    stored = ir.Value(shape=shape, type=element, const_value=tensor)
    value.replace_all_uses_with(stored)
    _drop(graph, value)
    # By its own name, from which its module is known, unless that is still read.
    stored.name = str(value.name) if found.name in graph.initializers else found.name
    graph.register_initializer(stored)


def _drop(graph: ir.Graph, value: ir.Value | None) -> None:
    """Remove what is not read any more, and all that only it reads."""
    if value is None or value.uses() or value.is_graph_output():
        return
    node = value.producer()
    if node is None:
        if value.is_initializer() and not value.is_graph_input():
            graph.initializers.pop(str(value.name))
        return
    if node.graph is not graph or any(each.uses() for each in node.outputs):
        return
    inputs = node.inputs
    graph.remove(node, safe=True)
    for each in dict.fromkeys(inputs):
        _drop(graph, each)
