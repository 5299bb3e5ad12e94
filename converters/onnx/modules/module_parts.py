"""Modules that a graph computes with several operators, each with a part of their outputs.

ONNX Runtime GenAI's builder takes Phi-3's ``gate_up_proj`` apart so, and ``qkv_proj`` where it is
told not to pack it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from converters.onnx.graph.site import Site
from converters.onnx.modules.slottable import SlottableModule
from converters.onnx.modules.weight_distance import allowed_distance, weight_distance
from converters.onnx.modules.weight_search import CLEARLY, WeightSearch
from loraport.adapter import ModuleKind


@dataclass(frozen=True, eq=False)
class SplitModule:
    """A linear module whose outputs are those of several operators.

    Attributes:
        module: The module.
        sites: The operators, all of one input, in the order of their outputs: they are all of it.
    """

    module: SlottableModule
    sites: tuple[Site, ...]


def split_modules(modules: Iterable[SlottableModule], sites: Iterable[Site]) -> list[SplitModule]:
    """Return the modules that linear sites of one input compute together, told by their values.

    Args:
        modules: Those that no site computes as a whole.
        sites: Those that compute no module as a whole.
    """
    linear = [module for module in modules if module.kind is ModuleKind.LINEAR]
    groups: dict[int, list[Site]] = defaultdict(list)
    for site in sites:
        if site.kind is ModuleKind.LINEAR:
            groups[id(site.x)].append(site)
    starting: dict[int, WeightSearch] = {}  # by the width of what modules start with
    found = []
    for group in groups.values():
        for site in group if len(group) > 1 else ():
            width = site.out_features
            if width not in starting:
                wider = [module for module in linear if module.out_features > width]
                starting[width] = WeightSearch(_part(module, 0, width) for module in wider)
            module = _whole(starting[width].find(site), linear)
            if module is not None and (parts := _parts(module, group)) is not None:
                found.append(SplitModule(module, parts))
    return found


def _whole(
    found: tuple[SlottableModule, ...] | str, modules: Iterable[SlottableModule]
) -> SlottableModule | None:
    if isinstance(found, str):
        return None
    return next(module for module in modules if module.path == found[0].path)


def _parts(module: SlottableModule, sites: Sequence[Site]) -> tuple[Site, ...] | None:
    """Return the sites that are a module's outputs, one after the other; ``None`` without all."""
    parts: list[Site] = []
    start = 0
    while start < module.out_features:
        left = [site for site in sites if site not in parts]
        near = sorted(_near(module, start, left), key=lambda entry: entry[0])
        if not near or (len(near) > 1 and near[1][0] <= CLEARLY * near[0][0]):
            return None
        parts.append(near[0][1])
        start += near[0][1].out_features
    return tuple(parts)


def _near(
    module: SlottableModule, start: int, sites: Iterable[Site]
) -> Iterator[tuple[float, Site]]:
    """Yield the sites whose weight is a module's from one of its outputs on, and how nearly."""
    for site in sites:
        width = site.out_features
        if site.fan_in == module.in_features and start + width <= module.out_features:
            distance = weight_distance(_part(module, start, width), site.weight())
            if distance <= allowed_distance(site):
                yield distance, site


def _part(module: SlottableModule, first: int, width: int) -> SlottableModule:
    def rows(start: int, stop: int) -> torch.Tensor:
        return module.rows(first + start, first + stop)

    return replace(module, out_features=width, rows=rows, stored=(module.stored, first, width))
