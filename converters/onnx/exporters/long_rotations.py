"""Where a decoder's graph has two tables of rotations and chooses one by the text's length."""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.graph.constants import constant

_ROTATING = frozenset({"GroupQueryAttention", "RotaryEmbedding"})


def long_rotations_after(model: ir.Model) -> int | None:
    """Return how many tokens a text may have before it is rotated by the table for longer ones.

    GenAI's builder lets an ``If`` of ``Greater`` than a constant choose cosines and sines.

    Args:
        model: A graph, whoever made it.

    Returns:
        ``None`` where nothing is chosen so.
    """
    for node in model.graph.all_nodes():
        if node.op_type != "If" or not _rotates(node):
            continue
        compared = node.inputs[0].producer() if node.inputs[0] is not None else None
        if compared is None or compared.op_type != "Greater":
            continue
        border = constant(compared.inputs[1])
        if border is not None:
            return int(border.array())
    return None


def _rotates(node: ir.Node) -> bool:
    return any(user.op_type in _ROTATING for value in node.outputs for user, _ in value.uses())
