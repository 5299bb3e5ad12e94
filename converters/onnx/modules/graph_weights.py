"""The base weights as an exported graph holds them, put back into a PyTorch model.

An int4 graph computes with rounded weights: it is another base, and what its adapters must be
compared with is a PyTorch model that has those same weights.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import nn

from converters.onnx.graph.source_graph import read_graph
from converters.onnx.modules.matching import Matcher, Unmatched
from converters.onnx.modules.slottable import linear_modules
from converters.onnx.operators import find_site


def load_graph_weights(graph: Path, model: nn.Module) -> list[str]:
    """Copy every linear weight of an exported graph into the model, in place.

    Tied weights stay tied: what is written to the output head is also the embedding's.

    Args:
        graph: ``model.onnx``.
        model: The base it was exported from.

    Returns:
        The paths of the modules whose weights were replaced.
    """
    modules = linear_modules(model)
    matcher = Matcher(modules)
    replaced = []
    for node in read_graph(graph).graph.all_nodes():
        site = find_site(node)
        if site is None:
            continue
        matched = matcher.match(site)
        if isinstance(matched, Unmatched):
            continue
        weight = torch.from_numpy(np.ascontiguousarray(site.weight().T).astype(np.float32))
        start = 0
        for module in matched:
            rows = weight[start : start + module.out_features]
            with torch.no_grad():
                modules[module.path].weight.copy_(rows)
            replaced.append(module.path)
            start += module.out_features
    return replaced
