"""The same graph with its quantized kernels computing in full precision.

``MatMulNBits`` may round its activations to 8 bits (``accuracy_level`` 4, what ONNX Runtime
GenAI's builder asks for on CPUs). That hides errors of weights, slots and adapters behind a much
larger noise; parity is therefore proved with ``accuracy_level`` 1, float32 activations.
"""

from __future__ import annotations

from pathlib import Path

_FLOAT32_ACTIVATIONS = 1


def with_float32_activations(graph: Path) -> bytes | None:
    """Return the graph serialized with float32 activations, or ``None`` if it has those.

    The weights stay in their data file, which a session finds by the graph's directory.
    """
    import onnx

    model = onnx.load(str(graph), load_external_data=False)
    changed = False
    for node in model.graph.node:
        if node.op_type != "MatMulNBits":
            continue
        for attribute in node.attribute:
            if attribute.name == "accuracy_level" and attribute.i != _FLOAT32_ACTIVATIONS:
                attribute.i = _FLOAT32_ACTIVATIONS
                changed = True
    return model.SerializeToString() if changed else None
