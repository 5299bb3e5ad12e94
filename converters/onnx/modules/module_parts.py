"""Modules that a graph computes with several operators, each with a part of their outputs.

ONNX Runtime GenAI's builder takes Phi-3's ``gate_up_proj`` apart so.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch

from converters.onnx.graph.site import Site
from converters.onnx.modules.slottable import SlottableModule
from converters.onnx.modules.weight_search import WeightSearch
from loraport.adapter import ModuleKind


def parts_of(
    modules: Iterable[SlottableModule], sites: Iterable[Site]
) -> Iterator[tuple[Site, str, int]]:
    """Yield the linear sites that compute equal parts of modules: site, module, first output.

    Args:
        modules: Those that no site computes as a whole.
        sites: Those that compute no module as a whole; told by their values, rounded ones too.
    """
    linear = [module for module in modules if module.kind is ModuleKind.LINEAR]
    for site in sites:
        if site.kind is not ModuleKind.LINEAR:
            continue
        width = site.out_features
        starts = {
            _part(module, start, width): start
            for module in linear
            if module.out_features > width and module.out_features % width == 0
            for start in range(0, module.out_features, width)
        }
        found = WeightSearch(starts).find(site)
        if not isinstance(found, str):
            yield site, found[0].path, starts[found[0]]


def _part(module: SlottableModule, first: int, width: int) -> SlottableModule:
    def rows(start: int, stop: int) -> torch.Tensor:
        return module.rows(first + start, first + stop)

    return replace(module, out_features=width, rows=rows, stored=(module.stored, first, width))
