"""Optimize what torch exported, but leave normalizations beside the products they follow.

The exporter's own optimization folds a ``BatchNormalization`` into the convolution or the linear
layer before it, whose weight is then another: no adapter of the module fits it, and nothing is left
of the normalization that one could replace. ONNX Runtime folds it while it loads a model, wherever
no slot lies between.
"""

from __future__ import annotations

import onnx_ir as ir
import torch

_NORMALIZATION = "BatchNormalization"
_APART = "loraport.apart"  # a domain that no rule of the optimizer knows


def optimize(program: torch.onnx.ONNXProgram) -> ir.Model:
    """Optimize an export, in place, without folding normalizations.

    Args:
        program: What ``torch.onnx.export(..., optimize=False)`` gave.

    Returns:
        Its model.
    """
    _rename(program.model, "", _APART)
    program.optimize()
    _rename(program.model, _APART, "")
    return program.model


def _rename(model: ir.Model, domain: str, new: str) -> None:
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        for node in graph.all_nodes():
            if node.op_type == _NORMALIZATION and node.domain == domain:
                node.domain = new
