"""Which modules of the base a site computes.

Rules, in this order; the first whose answer fits the site's shape and its values (nearly, where
the site's weight is quantized) wins:

1. the module path that ``torch.onnx.export`` records on its nodes;
2. the node's own name, as ONNX Runtime GenAI's builder writes it; a packed name
   (``qkv_proj``, ``gate_up_proj``) stands for several modules side by side;
3. the values: the modules whose weights, side by side, are the site's weight, or nearest to it
   where it is quantized.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from converters.onnx.graph.site import Site
from converters.onnx.modules.module_parts import SplitModule, split_modules
from converters.onnx.modules.slottable import SlottableModule
from converters.onnx.modules.weight_distance import allowed_distance, weight_distance
from converters.onnx.modules.weight_search import WeightSearch
from loraport.adapter import ModuleKind

Match = tuple[SlottableModule, ...]

# What packed projections are called, and the modules they stand for.
_PACKED = {
    "qkv_proj": (("q_proj", "k_proj", "v_proj"), ("query", "key", "value")),
    "gate_up_proj": (("gate_proj", "up_proj"),),
}


@dataclass(frozen=True)
class Unmatched:
    """Why a site has no modules."""

    reason: str


class SiteMatcher(Protocol):
    """Finds the modules that a site computes."""

    def match(self, site: Site) -> Match | Unmatched:
        """Return the modules whose outputs, side by side, are the site's output."""
        ...

    def split(self, sites: Sequence[Site], seen: Container[str]) -> Sequence[SplitModule]:
        """Return the modules that several of the sites compute, each a part of their outputs.

        Args:
            sites: Those that `match` has no modules for.
            seen: The modules that it has sites for.
        """
        ...


class Matcher:
    """Finds the modules of sites in one base model.

    Args:
        modules: The base's modules by path.
    """

    def __init__(self, modules: Mapping[str, SlottableModule]) -> None:
        self._by_kind = {
            kind: {path: module for path, module in modules.items() if module.kind is kind}
            for kind in ModuleKind
        }
        self._by_layer: dict[tuple[ModuleKind, str], list[SlottableModule]] = defaultdict(list)
        for module in modules.values():
            self._by_layer[module.kind, _layer(module.path)].append(module)
        self._search = WeightSearch(modules.values())

    def match(self, site: Site) -> Match | Unmatched:
        """Return the modules whose outputs, side by side, are the site's output."""
        reasons = []
        for source, candidate in self._named(site):
            reason = _misfit(site, candidate)
            if reason is None:
                return candidate
            reasons.append(f"{source} says {'+'.join(m.path for m in candidate)}, but {reason}")
        by_value = self._search.find(site)
        if not isinstance(by_value, str):
            return by_value
        return Unmatched("; ".join(reasons) or by_value)

    def split(self, sites: Sequence[Site], seen: Container[str]) -> Sequence[SplitModule]:
        """Return the modules that several of the sites compute, each a part of their outputs."""
        linear = self._by_kind[ModuleKind.LINEAR].items()
        return split_modules([module for path, module in linear if path not in seen], sites)

    def _named(self, site: Site) -> Iterator[tuple[str, Match]]:
        modules = self._by_kind[site.kind]
        for path in _recorded_scopes(site):
            if path in modules:
                yield "the export's metadata", (modules[path],)
                break
        path = _path_of_node_name(_name(site))
        if path in modules:
            yield "the node's name", (modules[path],)
            return
        leaf = path.rpartition(".")[2]
        layer = self._by_layer.get((site.kind, _layer(path)), [])
        for leaves in ((leaf,), *_PACKED.get(leaf, ())):
            found = [
                [module for module in layer if module.path.rpartition(".")[2] == wanted]
                for wanted in leaves
            ]
            if all(len(fitting) == 1 for fitting in found):
                yield "the node's name", tuple(fitting[0] for fitting in found)


def _misfit(site: Site, candidate: Match) -> str | None:
    """Return why these modules are not what the site computes, or ``None`` if they are."""
    outputs = sum(module.out_features for module in candidate)
    if outputs != site.out_features or any(
        module.in_features != site.fan_in for module in candidate
    ):
        inputs = candidate[0].in_features
        return f"the node maps {site.fan_in} to {site.out_features}, not {inputs} to {outputs}"
    weight = site.weight()
    start = 0
    for module in candidate:
        stop = start + module.out_features
        if weight_distance(module, weight[:, start:stop]) > allowed_distance(site):
            return f"the node's weight is not {module.path}'s"
        start = stop
    return None


def _recorded_scopes(site: Site) -> list[str]:
    recorded = site.node.metadata_props.get("pkg.torch.onnx.name_scopes")
    if recorded is None:
        return []
    try:
        scopes = ast.literal_eval(recorded)
    except (ValueError, SyntaxError):
        return []
    return [str(scope) for scope in reversed(scopes)]


def _path_of_node_name(name: str) -> str:
    """Return ``/model/layers.0/attn/o_proj/MatMul_Q4`` as ``model.layers.0.attn.o_proj``."""
    return ".".join(part for part in name.split("/")[:-1] if part)


def _layer(path: str) -> str:
    found = re.search(r"\.(\d+)\.", f".{path}.")
    return found[1] if found else ""


def _name(site: Site) -> str:
    return site.node.name or ""
