"""OLMo's norms take the mean away and have no weights, in the graph as in the model.

Version 0.18 of GenAI's builder writes norms by the root mean square alone, with 1e-6 added to the
variance, where OLMo's take the mean away first and add 1e-5, which is written in its code alone.
"""

from __future__ import annotations

import onnx_ir as ir
from torch import nn

_NORM = "OlmoLayerNorm"
_EPSILON = 1e-5
# The same inputs and outputs, in the same order.
_WITH_MEAN = {
    "SimplifiedLayerNormalization": "LayerNormalization",
    "SkipSimplifiedLayerNormalization": "SkipLayerNormalization",
}


def set_olmo_norms(graph: ir.Model, model: nn.Module) -> None:
    """Give the graph of an OLMo the norms of the model, in place; others stay as they are.

    Args:
        graph: The builder's graph.
        model: What it was built from.
    """
    if not any(type(module).__name__ == _NORM for module in model.modules()):
        return
    for node in graph.graph.all_nodes():
        if node.op_type in _WITH_MEAN:
            node.op_type = _WITH_MEAN[node.op_type]
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", _EPSILON)
