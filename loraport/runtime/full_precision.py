"""The same graph with its quantized kernels computing in full precision.

``MatMulNBits`` may round its activations to 8 bits (``accuracy_level`` 4, what ONNX Runtime
GenAI's builder asks for on CPUs). That hides errors of weights, slots and adapters behind a much
larger noise; parity is therefore proved with ``accuracy_level`` 1, float32 activations.

ONNX Runtime makes such operators itself of a weight that is dequantized for its product alone;
`FUSED_FLOAT32` is the session's setting for those.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx

_FLOAT32_ACTIVATIONS = 1
FUSED_FLOAT32 = ("session.qdq_matmulnbits_accuracy_level", str(_FLOAT32_ACTIVATIONS))


def with_float32_activations(graph: Path) -> bytes | None:
    """Return the graph serialized with float32 activations, or ``None`` if it asks for no others.

    The weights stay in their data file, which a session finds by the graph's directory.
    """
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    return model.SerializeToString() if ask_for_float32(model) else None


def ask_for_float32(model: onnx.ModelProto) -> bool:
    """Let 4-bit and 8-bit products have float32 activations, in place; tell if any had others."""
    levels = _levels_that_round(model.graph)
    for level in levels:
        level.i = _FLOAT32_ACTIVATIONS
    return bool(levels)


def rounds_activations(graph: Path) -> bool:
    """Tell whether ONNX Runtime may round activations in a graph that a session opens as it is."""
    import onnx

    whole = onnx.load(str(graph), load_external_data=False).graph
    if _levels_that_round(whole):
        return True
    nodes = list(_nodes(whole))
    made = {name: node for node in nodes for name in node.output}
    for node in nodes:
        if node.op_type in ("MatMul", "Gemm"):
            x, weight = (made.get(name) for name in node.input[:2])
            if _dequantizes(weight) and not _dequantizes(x):  # both are an integer product's
                return True
    return False


def _levels_that_round(graph: onnx.GraphProto) -> list[onnx.AttributeProto]:
    return [
        attribute
        for node in _nodes(graph)
        if node.op_type == "MatMulNBits"
        for attribute in node.attribute
        if attribute.name == "accuracy_level" and attribute.i != _FLOAT32_ACTIVATIONS
    ]


def _dequantizes(node: onnx.NodeProto | None) -> bool:
    return node is not None and node.op_type == "DequantizeLinear"


def _nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Yield the operators of a graph, its branches' and bodies' too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, attribute.g):
                yield from _nodes(inner)
