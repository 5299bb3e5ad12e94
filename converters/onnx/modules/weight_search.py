"""Finds the modules whose weights, side by side, are a site's: its names are lost or lie.

First rows decide who is compared as a whole: each module's is read once and kept. A rounded
weight belongs to the nearest module, if it is near enough and no other is nearly as near.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch

from converters.onnx.graph.site import Site
from converters.onnx.modules.slottable import SlottableModule
from converters.onnx.modules.weight_distance import allowed_distance, weight_distance
from loraport.adapter import ModuleKind

# The second nearest must be this much farther than the nearest.
CLEARLY = 1.5
# First rows, alone, scatter more than whole weights.
_SLACK = 1.6


@dataclass(frozen=True)
class _Probes:
    """Modules of one kind and input width, the first row of each, and that row's norm."""

    modules: tuple[SlottableModule, ...]
    rows: torch.Tensor  # [modules, in]
    norms: torch.Tensor  # [modules]


class WeightSearch:
    """Looks modules up by their weights.

    Args:
        modules: The base's modules.
    """

    def __init__(self, modules: Iterable[SlottableModule]) -> None:
        self._modules = tuple(modules)
        self._probes: dict[tuple[ModuleKind, int], _Probes] = {}

    def find(self, site: Site) -> tuple[SlottableModule, ...] | str:
        """Return the modules whose weights, side by side, are the site's; else why there are none.

        Args:
            site: Its weight is read once.
        """
        name = site.node.name or "this operator"
        nothing = f"no module is named or weighted like {name}"
        probes = self._probes_of(site.kind, site.fan_in)
        if not probes.modules:
            return nothing
        weight = site.weight()
        members: list[SlottableModule] = []
        start = 0
        while start < site.out_features:
            found = self._at(site, weight, start, probes)
            if isinstance(found, str):
                return found
            if found is None:
                return nothing
            members.append(found)
            start += found.out_features
        return tuple(members)

    def _at(
        self, site: Site, weight: np.ndarray, start: int, probes: _Probes
    ) -> SlottableModule | str | None:
        """Return the module whose weight begins at a column of the site's."""
        allowed = allowed_distance(site)
        row = torch.from_numpy(np.array(weight[:, start], np.float32))
        apart = (probes.rows - row).norm(dim=1)
        near = apart <= max(_SLACK * allowed, 1e-2) * probes.norms
        distances: list[tuple[float, SlottableModule]] = []
        for index in near.nonzero().flatten().tolist():
            module = probes.modules[index]
            columns = weight[:, start : start + module.out_features]
            distance = weight_distance(module, columns)
            if distance <= allowed:
                distances.append((distance, module))
        distances.sort(key=lambda entry: entry[0])
        if not distances:
            return None
        best = distances[0][0]
        fitting = [module for distance, module in distances if distance <= CLEARLY * best]
        if len(fitting) == 1:
            return fitting[0]
        twins = ", ".join(module.path for module in fitting)
        same = "nearly the same" if best else "the same"
        return f"{same} weights belong to {twins}, and no name tells them apart"

    def _probes_of(self, kind: ModuleKind, width: int) -> _Probes:
        if (kind, width) not in self._probes:
            modules = tuple(
                module
                for module in self._modules
                if module.kind is kind and module.in_features == width
            )
            rows = [module.rows(0, 1).float().reshape(1, width) for module in modules]
            stacked = torch.cat(rows) if rows else torch.empty(0, width)
            self._probes[kind, width] = _Probes(modules, stacked, stacked.norm(dim=1))
        return self._probes[kind, width]
