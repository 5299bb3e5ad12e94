"""Optimize what torch exported, but leave normalizations and their vectors what they are.

The exporter's own optimization folds a ``BatchNormalization`` into the convolution or the linear
layer before it, whose weight is then another: no adapter of the module fits it, and nothing is left
of the normalization that one could replace. It folds the ``Unsqueeze`` that spreads a vector over
channels (``GroupNorm``'s weight, layer scales) into a constant of another name and shape, too.
ONNX Runtime folds both while it loads a model, wherever no slot lies between.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx_ir as ir
import torch

_NORMALIZATION, _SPREADING = "BatchNormalization", "Unsqueeze"
_APART = "loraport.apart"  # a domain that no rule of the optimizer knows


def optimize(program: torch.onnx.ONNXProgram, parameters: Collection[str]) -> ir.Model:
    """Optimize an export, in place, without folding normalizations and spread vectors.

    Args:
        program: What ``torch.onnx.export(..., optimize=False)`` gave.
        parameters: The names of the module's parameters and stored buffers.

    Returns:
        Its model.
    """
    for node in _nodes(program.model):
        if node.domain == "" and (
            node.op_type == _NORMALIZATION
            or (node.op_type == _SPREADING and _is_vector(node.inputs[0], parameters))
        ):
            node.domain = _APART
            if node.op_type == _SPREADING and node.inputs[0] is not None:
                node.outputs[0].type = node.inputs[0].type  # else what follows casts it
    program.optimize()
    for node in _nodes(program.model):
        if node.domain == _APART:
            node.domain = ""
    return program.model


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for graph in (model.graph, *(function.graph for function in model.functions.values())):
        yield from graph.all_nodes()


def _is_vector(value: ir.Value | None, parameters: Collection[str]) -> bool:
    return (
        value is not None
        and value.name in parameters
        and value.shape is not None
        and len(value.shape) == 1
    )
