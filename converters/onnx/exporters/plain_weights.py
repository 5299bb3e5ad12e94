"""Weights as ONNX Runtime's quantizers look for them: initializers, right at the product.

What is a ``Constant`` or behind a ``Transpose`` they leave as it is, and say nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from converters.onnx.graph.functions import nodes_of

if TYPE_CHECKING:
    from onnx import ModelProto


def make_weights_plain(model: ModelProto) -> None:
    """Make initializers of ``Constant`` matrices, and transpose once what is in every run.

    Args:
        model: A model with its weights in memory, changed in place.
    """
    lift_constants(model)
    fold_transposes(model)


def lift_constants(model: ModelProto) -> None:
    """Make initializers of the main graph's ``Constant`` matrices, in place."""
    graph = model.graph
    outputs = {value.name for value in graph.output}
    for node in list(graph.node):
        if node.op_type != "Constant" or node.output[0] in outputs:
            continue
        value = next((entry.t for entry in node.attribute if entry.name == "value"), None)
        if value is not None and len(value.dims) >= 2:
            graph.initializer.add().CopyFrom(value)
            graph.initializer[-1].name = node.output[0]
            graph.node.remove(node)


def fold_transposes(model: ModelProto) -> None:
    """Replace each ``Transpose`` of a stored matrix by the matrix transposed, in place.

    The new one is called ``NAME_transposed``, so that its module is still known. Stored matrices
    that nothing reads any more are removed.
    """
    import numpy as np
    from onnx import numpy_helper

    graph = model.graph
    fixed = {value.name for value in (*graph.input, *graph.output)}
    stored = {weight.name: weight for weight in graph.initializer if weight.name not in fixed}
    taken = {*stored, *fixed, *(name for node in nodes_of(graph.node) for name in node.output)}
    renamed: dict[str, str] = {}
    for node in list(graph.node):
        if node.op_type != "Transpose" or node.output[0] in fixed:
            continue
        weight = stored.get(node.input[0])
        if weight is None or len(weight.dims) != 2:
            continue
        perm = next((list(entry.ints) for entry in node.attribute if entry.name == "perm"), [1, 0])
        name = f"{weight.name}_transposed"
        if name in taken:  # something else, or the same weight transposed twice
            name = node.output[0]
        taken.add(name)
        turned = np.ascontiguousarray(numpy_helper.to_array(weight).transpose(perm))
        graph.initializer.append(numpy_helper.from_array(turned, name))
        renamed[node.output[0]] = name
        graph.node.remove(node)
    read = set()
    for node in nodes_of(graph.node):
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        read.update(node.input)
    for weight in [stored[name] for name in stored if name not in read]:
        graph.initializer.remove(weight)
