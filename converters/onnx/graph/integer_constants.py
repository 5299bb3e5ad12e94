"""Constants of integers in graphs of old opsets, whose ``Constant`` gives floats only."""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.graph.rewriting import opset_of

_ANY_CONSTANT = 9  # from this opset on


def store_integer_constants(graph: ir.Graph) -> None:
    """Make ``Constant`` operators of integers initializers where the opset has none, in place."""
    for node in list(graph.all_nodes()):
        if node.op_type != "Constant" or opset_of(node) >= _ANY_CONSTANT:
            continue
        output, attribute = node.outputs[0], node.attributes.get("value")
        tensor = None if attribute is None else attribute.as_tensor()
        owner = node.graph
        if tensor is None or tensor.dtype.is_floating_point():
            continue
        if output.is_graph_output() or not isinstance(owner, ir.Graph):
            continue
        stored = ir.Value(
            name=output.name,
            shape=ir.Shape(tensor.shape.numpy()),
            type=ir.TensorType(tensor.dtype),
            const_value=ir.Tensor(tensor.numpy(), dtype=tensor.dtype, name=output.name),
        )
        output.replace_all_uses_with(stored)
        owner.remove(node, safe=True)
        owner.register_initializer(stored)
