"""What norms add to the variance, in the graph as in the model.

Version 0.18 of GenAI's builder knows it by the name ``rms_norm_eps`` alone, and takes 1e-6 for
decoders that call it otherwise (``layer_norm_eps`` of Phi, ``norm_eps`` of Nemotron).
"""

from __future__ import annotations

import onnx_ir as ir
from torch import nn

from converters.onnx.modules.stored_gains import NORMS


def set_norm_epsilons(graph: ir.Model, model: nn.Module) -> None:
    """Give the graph's norms the epsilon of the model's, in place, where all of these have one.

    Args:
        graph: The builder's graph.
        model: What it was built from.
    """
    epsilons = {_epsilon(module) for module in model.modules() if "Norm" in type(module).__name__}
    if len(epsilons) != 1 or (epsilon := epsilons.pop()) is None:
        return
    for node in graph.graph.all_nodes():
        if node.op_type in NORMS:
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", epsilon)
        elif "qk_norm_epsilon" in node.attributes:  # norms inside attention
            node.attributes["qk_norm_epsilon"] = ir.AttrFloat32("qk_norm_epsilon", epsilon)


def _epsilon(norm: nn.Module) -> float | None:
    found = getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
    return found if isinstance(found, float) else None
