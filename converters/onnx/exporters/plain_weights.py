"""Weights as ONNX Runtime's quantizers look for them: initializers, right at the product.

What is an input of the graph, a ``Constant`` or behind ``Transpose`` or ``Identity`` they leave as
it is, and say nothing; the one for 4 bits does so with ``Gemm``, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from converters.onnx.graph.functions import nodes_of

if TYPE_CHECKING:
    from onnx import ModelProto

_FIXED = 4  # the first IR version whose initializers need not be inputs
_PLAIN_GEMM = {"alpha": 1.0, "transA": 0}


def make_weights_plain(model: ModelProto, *, gemms: bool = False) -> None:
    """Make initializers of ``Constant`` matrices, and transpose once what is in every run.

    Args:
        model: A model with its weights in memory, changed in place.
        gemms: Make products of ``Gemm``, too.
    """
    fix_inputs(model)
    lift_constants(model)
    drop_identities(model)
    if gemms:
        split_gemms(model)
    fold_transposes(model)


def fix_inputs(model: ModelProto) -> None:
    """Take matrices off the inputs, in place; initializers had to be inputs once."""
    graph = model.graph
    stored = {weight.name for weight in graph.initializer if len(weight.dims) >= 2}
    for value in [value for value in graph.input if value.name in stored]:
        graph.input.remove(value)
    model.ir_version = max(model.ir_version, _FIXED)


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


def drop_identities(model: ModelProto) -> None:
    """Let operators read stored values that they read through ``Identity``, in place.

    So PyTorch's exporter writes what several layers share; quantizers see the first alone.
    """
    graph = model.graph
    fixed = {value.name for value in (*graph.input, *graph.output)}
    known = {weight.name: weight.name for weight in graph.initializer if weight.name not in fixed}
    for node in list(graph.node):
        if node.op_type == "Identity" and node.input[0] in known and node.output[0] not in fixed:
            known[node.output[0]] = known[node.input[0]]
            graph.node.remove(node)
    for node in nodes_of(graph.node):
        for index, name in enumerate(node.input):
            node.input[index] = known.get(name, name)


def split_gemms(model: ModelProto) -> None:
    """Replace each ``Gemm`` with a stored matrix by ``MatMul`` and ``Add``, in place.

    One that scales its product, or transposes its input, stays as it is: what an adapter adds to
    a bias would be scaled, too.
    """
    from onnx import helper

    graph = model.graph
    stored = {w.name: w.data_type for w in graph.initializer if len(w.dims) == 2}
    taken = {value.name for value in (*graph.initializer, *graph.input)}
    taken.update(name for node in nodes_of(graph.node) for name in node.output)

    def free(name: str) -> str:
        while name in taken:
            name += "_"
        taken.add(name)
        return name

    nodes = []
    for node in graph.node:
        settings = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        turned, beta = settings.pop("transB", 0), settings.pop("beta", 1.0)
        if (
            node.op_type != "Gemm"
            or any(value != _PLAIN_GEMM.get(name) for name, value in settings.items())
            or node.input[1] not in stored
        ):
            nodes.append(node)
            continue
        x, weight, *bias = filter(None, node.input)
        (y,) = node.output
        if not beta:
            bias = []
        product = free(f"{y}_product") if bias else y
        if bias and beta != 1.0:
            factor, unscaled, bias = free(f"{y}_beta"), bias, [free(f"{y}_bias")]
            graph.initializer.append(helper.make_tensor(factor, stored[weight], [], [beta]))
            nodes.append(helper.make_node("Mul", [*unscaled, factor], bias))
        if turned:
            as_stored, weight = weight, free(f"{y}_weight")
            nodes.append(helper.make_node("Transpose", [as_stored], [weight], perm=[1, 0]))
        nodes.append(helper.make_node("MatMul", [x, weight], [product], name=node.name))
        if bias:
            name = node.name and f"{node.name}/bias"
            nodes.append(helper.make_node("Add", [product, *bias], [y], name=name))
    del graph.node[:]
    graph.node.extend(nodes)


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
    made: dict[tuple[str, tuple[int, ...]], str] = {}
    for node in list(graph.node):
        if node.op_type != "Transpose" or node.output[0] in fixed:
            continue
        weight = stored.get(node.input[0])
        if weight is None or len(weight.dims) != 2:
            continue
        perm = next((tuple(entry.ints) for entry in node.attribute if entry.name == "perm"), (1, 0))
        if (weight.name, perm) not in made:
            name = f"{weight.name}_transposed"
            if name in taken:
                name = node.output[0]
            taken.add(name)
            turned = np.ascontiguousarray(numpy_helper.to_array(weight).transpose(perm))
            graph.initializer.append(numpy_helper.from_array(turned, name))
            made[weight.name, perm] = name
        renamed[node.output[0]] = made[weight.name, perm]
        graph.node.remove(node)
    read = set()
    for node in nodes_of(graph.node):
        for index, name in enumerate(node.input):
            node.input[index] = renamed.get(name, name)
        read.update(node.input)
    for weight in [stored[name] for name in stored if name not in read]:
        graph.initializer.remove(weight)
