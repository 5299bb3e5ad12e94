"""Shapes that follow from those of a graph's inputs."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from converters.onnx.graph.constants import constant

_GIVE_OTHERS = (
    "Optional",
    "SequenceConstruct",
    "SequenceEmpty",
    "SequenceErase",
    "SequenceInsert",
    "SequenceMap",
    "SplitToSequence",
)
_READ_OTHERS = (  # as their first input
    "ConcatFromSequence",
    "OptionalGetElement",
    "OptionalHasElement",
    "SequenceAt",
    "SequenceErase",
    "SequenceInsert",
    "SequenceLength",
    "SequenceMap",
)


_MICROSOFT = "com.microsoft"
# Operators of ONNX Runtime, of whose shapes onnx knows nothing. Their first output is like their
# first input, ...
_ALIKE = (
    "BiasAdd",
    "BiasGelu",
    "FastGelu",
    "Gelu",
    "QLinearLeakyRelu",
    "QLinearSigmoid",
    "QLinearSoftmax",
    "QuickGelu",
    "RotaryEmbedding",
    "SimplifiedLayerNormalization",
    "SkipLayerNormalization",
    "SkipSimplifiedLayerNormalization",
)
# ... or but for its last dimension.
_PRODUCTS = (
    "Attention",
    "DynamicQuantizeMatMul",
    "FusedGemm",
    "FusedMatMul",
    "GroupQueryAttention",
    "MatMulBnb4",
    "MatMulNBits",
    "MultiHeadAttention",
    "QGemm",
)
_OF_TWO = {"QLinearAdd": "Add", "QLinearMul": "Mul"}  # their second number is the fourth input
_ZERO_OF_OUTPUT = 8  # among QGemm's inputs
_TURNED = ("channels_last", "transA", "transBatchA", "transBatchB")


def infer_shapes(model: ir.Model) -> None:
    """Note the shapes of a graph's values, in place, and the types of tensors.

    onnx-ir notes the type of their elements for sequences and optional values, also where it was
    known; those keep what they had. onnx knows the numbers that are shapes by their names alone,
    through all branches: those of one name have names of their own for it.
    """
    copy = model.clone()
    _tell_apart(copy.graph)
    matrices: dict[int, ir.Value] = {}
    for node in list(copy.graph.all_nodes()):
        _stand_in(node, matrices)
    copy.graph.inputs.extend(matrices.values())
    ShapeInferencePass(check_type=False, strict_mode=False)(copy)
    for value, inferred in zip(_outputs(model), _outputs(copy), strict=True):
        if value.type is None and _is_no_tensor(value):
            continue
        value.shape = inferred.shape
        value.type = value.type or inferred.type


def _outputs(model: ir.Model) -> list[ir.Value]:
    return [value for node in model.graph.all_nodes() for value in node.outputs]


def _stand_in(node: ir.Node, matrices: dict[int, ir.Value]) -> None:
    """Put a standard operator whose output has the same shape in the place of ONNX Runtime's.

    Args:
        node: Any operator, changed in place.
        matrices: Columns → a matrix of so many, 0 for any; those that are needed are added.
    """
    simplified = node.op_type == "SimplifiedLayerNormalization"  # in the standard domain
    if node.domain != _MICROSOFT and not simplified:
        return
    if node.op_type in _ALIKE:
        operator = "Identity"
        node.resize_inputs(1)
    elif node.op_type == "QLinearGlobalAveragePool" and not _is_turned(node):
        operator = "GlobalAveragePool"
        node.resize_inputs(1)
    elif node.op_type in _OF_TWO:
        operator = _OF_TWO[node.op_type]
        node.replace_input_with(1, node.inputs[3])
        node.resize_inputs(2)
    elif node.op_type in _PRODUCTS and not _is_turned(node):
        operator = "MatMul"
        node.resize_inputs(2)
        if not _is_product_of_any(node):
            columns = node.attributes.get_int("N", 0)
            if columns not in matrices:
                kind, shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, columns or None])
                matrices[columns] = ir.Value(name=f"matrix/{columns}", type=kind, shape=shape)
            node.replace_input_with(1, matrices[columns])
    else:
        return
    node.op_type, node.domain = operator, ""
    node.attributes.clear()


def _is_turned(node: ir.Node) -> bool:
    """Tell whether an operator does not read its first input as it lies, or gives another type."""
    if node.op_type == "QGemm" and not _gives_what_it_reads(node):
        return True
    if node.op_type == "MultiHeadAttention":  # queries, keys and values may be packed
        return len(node.inputs) == 1 or node.inputs[1] is None
    if any(node.attributes.get_int(name, 0) for name in _TURNED):
        return True
    if node.op_type != "FusedMatMul" or _is_product_of_any(node):
        return False
    matrix = constant(node.inputs[1])
    return matrix is None or len(matrix.shape) != 2


def _gives_what_it_reads(node: ir.Node) -> bool:
    """Tell whether the zero points of a ``QGemm``'s first input and of its output are alike."""
    zeros = [node.inputs[i] if i < len(node.inputs) else None for i in (2, _ZERO_OF_OUTPUT)]
    given, made = (None if zero is None else zero.dtype for zero in zeros)
    return given is not None and given is made


def _is_product_of_any(node: ir.Node) -> bool:
    """Tell whether an operator multiplies two values as they lie, stacks of matrices, too."""
    return node.op_type == "FusedMatMul" and not node.attributes.get_int("transB", 0)


def _is_no_tensor(value: ir.Value) -> bool:
    producer = value.producer()
    if producer is not None and producer.op_type in _GIVE_OTHERS:
        return True
    return any(node.op_type in _READ_OTHERS and index == 0 for node, index in value.uses())


def _tell_apart(graph: ir.Graph) -> None:
    """Give values in subgraphs that have another's name one of their own, in place."""
    outside = [*graph.inputs, *graph.initializers.values(), *_made_in(graph)]
    inner = [value for subgraph in graph.subgraphs() for value in _inside(subgraph)]
    known = {value.name for value in (*outside, *inner)}
    seen = {value.name for value in outside}
    for value in inner:
        name = value.name
        if name and name in seen:
            value.name = next(new for n in count() if (new := f"{name}/alike_{n}") not in known)
            known.add(value.name)
        seen.add(name)


def _made_in(graph: ir.Graph) -> Iterator[ir.Value]:
    for node in graph:
        yield from node.outputs


def _inside(subgraph: ir.Graph) -> Iterator[ir.Value]:
    """Yield a subgraph's own values, each once."""
    yield from subgraph.inputs
    inputs = {id(value) for value in subgraph.inputs}
    yield from (v for v in list(subgraph.initializers.values()) if id(v) not in inputs)
    yield from _made_in(subgraph)
