"""Shapes that follow from those of a graph's inputs."""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

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


def infer_shapes(model: ir.Model) -> None:
    """Note the shapes of a graph's values, in place, and the types of tensors.

    onnx-ir notes the type of their elements for sequences and optional values, also where it was
    known; those keep what they had.
    """
    values = [value for node in model.graph.all_nodes() for value in node.outputs]
    before = [(value, value.type, value.shape) for value in values]
    ShapeInferencePass(check_type=False, strict_mode=False)(model)
    for value, kind, shape in before:
        if kind is not None:
            value.type = kind
        elif _is_no_tensor(value):
            value.type, value.shape = kind, shape


def _is_no_tensor(value: ir.Value) -> bool:
    producer = value.producer()
    if producer is not None and producer.op_type in _GIVE_OTHERS:
        return True
    return any(node.op_type in _READ_OTHERS and index == 0 for node, index in value.uses())
