"""The base weights as an exported graph holds them, put back into a PyTorch model.

An int4 graph computes with rounded weights: it is another base, and what its adapters must be
compared with is a PyTorch model that has those same weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from converters.onnx.graph.site import Site
from converters.onnx.graph.source_graph import read_graph
from converters.onnx.modules.matching import Matcher, Unmatched
from converters.onnx.modules.slottable import other_matrices, slottable_modules, tied_modules
from converters.onnx.operators import find_site
from loraport.adapter import ModuleKind
from loraport.base.storage import stores_in_out
from loraport.parity.changes import untie


def load_graph_weights(graph: Path, model: nn.Module) -> list[str]:
    """Copy every linear weight and rounded embedding of an exported graph into the model, in place.

    Routers of experts, which have no slots, are copied where the graph has them rounded.

    An embedding that is tied to the output head gets the graph's own rows: quantizers round both
    where they are one tensor of the graph, and else the head alone. A module that the graph
    computes with several operators, side by side, gets the weights of all of them.

    Args:
        graph: ``model.onnx``.
        model: The base it was exported from.

    Returns:
        The paths of the modules whose weights were replaced.
    """
    sites = [s for s in map(find_site, read_graph(graph).graph.all_nodes()) if s is not None]
    modules = slottable_modules(model)
    tied = _load_tied_embedding(sites, model)
    matcher = Matcher({path: module for path, module in modules.items() if path not in tied})
    replaced: dict[str, None] = {}
    left = []
    for site in sites:
        if site.kind is ModuleKind.CONV or (
            site.kind is ModuleKind.EMBEDDING and not site.quantized
        ):
            continue
        matched = matcher.match(site)
        if isinstance(matched, Unmatched):
            left.append(site)
            continue
        weight = _rows(site)
        start = 0
        for found in matched:
            _store(weight[start : start + found.out_features], model.get_submodule(found.path))
            replaced[found.path] = None
            start += found.out_features
    for split in matcher.split(left, replaced):
        weight = torch.cat([_rows(site) for site in split.sites])
        _store(weight, model.get_submodule(split.module.path))
        replaced[split.module.path] = None
    others = Matcher(other_matrices(model))
    for site in left:
        router = others.match(site) if site.quantized else Unmatched("stored as it was")
        if isinstance(router, tuple) and len(router) == 1:
            _store(_rows(site), model.get_submodule(router[0].path))
            replaced[router[0].path] = None
    return list(replaced)


def _rows(site: Site) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(site.weight().T).astype(np.float32))


@torch.no_grad()
def _store(weight: torch.Tensor, module: nn.Module) -> None:
    """Copy a weight ``[out, in]`` into a module."""
    own = module.get_parameter("weight")
    (own.T if stores_in_out(module) else own).copy_(weight)


@torch.no_grad()
def _load_tied_embedding(sites: Sequence[Site], model: nn.Module) -> set[str]:
    """Give the input embedding the graph's rows, and heads that share its weight their own.

    Returns:
        The paths of such embeddings.
    """
    found: set[str] = set()
    tables = [site for site in sites if site.kind is ModuleKind.EMBEDDING]
    for group in tied_modules(slottable_modules(model)):
        embeddings = [p for p in group if isinstance(model.get_submodule(p), nn.Embedding)]
        heads = [path for path in group if path not in embeddings]
        if len(embeddings) != 1 or not heads:
            continue
        found.update(embeddings)
        own = model.get_submodule(embeddings[0]).get_parameter("weight")  # [rows, out]
        rows = [
            torch.from_numpy(np.ascontiguousarray(site.weight()).astype(np.float32))
            for site in tables
            if (site.in_features, site.out_features) == tuple(own.shape)
        ]
        if not rows:
            continue
        for path in heads:
            untie(model, path)
        own.copy_(min(rows, key=lambda each: float((each - own.float()).norm())))
    return found
