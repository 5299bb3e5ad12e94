"""Which modules of the base a site computes.

Rules, in this order; the first whose answer fits the site's shape and its values (nearly, where
the site's weight is quantized) wins:

1. the module path that ``torch.onnx.export`` records on its nodes;
2. the node's own name, as ONNX Runtime GenAI's builder writes it; a packed name
   (``qkv_proj``, ``gate_up_proj``) stands for several modules side by side;
3. the values: the modules whose weights, side by side, are the site's weight.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from converters.onnx.modules import SlottableModule
from converters.onnx.site import Site
from loraport.adapter import ModuleKind

Match = tuple[SlottableModule, ...]

# What packed projections are called, and the modules they stand for.
_PACKED = {
    "qkv_proj": (("q_proj", "k_proj", "v_proj"), ("query", "key", "value")),
    "gate_up_proj": (("gate_proj", "up_proj"),),
}

# Relative distance of a quantized weight from its original: 4-bit blocks stay below 0.2, where
# unrelated weights are at 1.4.
_QUANTIZATION_DISTANCE = 0.5


@dataclass(frozen=True)
class Unmatched:
    """Why a site has no modules."""

    reason: str


class SiteMatcher(Protocol):
    """Finds the modules that a site computes."""

    def match(self, site: Site) -> Match | Unmatched:
        """Return the modules whose outputs, side by side, are the site's output."""
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

    def match(self, site: Site) -> Match | Unmatched:
        """Return the modules whose outputs, side by side, are the site's output."""
        reasons = []
        for source, candidate in self._named(site):
            reason = _misfit(site, candidate)
            if reason is None:
                return candidate
            reasons.append(f"{source} says {'+'.join(m.path for m in candidate)}, but {reason}")
        by_value = self._by_value(site)
        if not isinstance(by_value, str):
            return by_value
        return Unmatched("; ".join(reasons) or by_value)

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
        layer = [module for module in modules.values() if _layer(module.path) == _layer(path)]
        for leaves in ((leaf,), *_PACKED.get(leaf, ())):
            found = [
                [module for module in layer if module.path.rpartition(".")[2] == wanted]
                for wanted in leaves
            ]
            if all(len(fitting) == 1 for fitting in found):
                yield "the node's name", tuple(fitting[0] for fitting in found)

    def _by_value(self, site: Site) -> Match | str:
        """Return the modules whose weights, side by side, are the site's; else why there are none.

        Only the first column is compared until it fits: whole weights are large.
        """
        nothing = f"no module is named or weighted like {_name(site) or 'this operator'}"
        if site.quantized:
            return nothing
        weight = site.weight()
        members: list[SlottableModule] = []
        start = 0
        while start < site.out_features:
            column = weight[:, start : start + 1]
            fitting = [
                module
                for module in self._by_kind[site.kind].values()
                if _equal(module.weight[:1], column)
                and _equal(module.weight, weight[:, start : start + module.out_features])
            ]
            if len(fitting) > 1:
                twins = ", ".join(module.path for module in fitting)
                return f"the same weights belong to {twins}, and no name tells them apart"
            if not fitting:
                return nothing
            members.append(fitting[0])
            start += fitting[0].out_features
        return tuple(members)


def _misfit(site: Site, candidate: Match) -> str | None:
    """Return why these modules are not what the site computes, or ``None`` if they are."""
    outputs = sum(module.out_features for module in candidate)
    if outputs != site.out_features or any(
        module.in_features != site.fan_in for module in candidate
    ):
        inputs = candidate[0].in_features
        return f"the node maps {site.fan_in} to {site.out_features}, not {inputs} to {outputs}"
    weight = site.weight()
    same = _near if site.quantized else _equal
    start = 0
    for module in candidate:
        if not same(module.weight, weight[:, start : start + module.out_features]):
            return f"the node's weight is not {module.path}'s"
        start += module.out_features
    return None


def _near(module_weight: torch.Tensor, weight: np.ndarray) -> bool:
    """Tell whether ``[in, out]`` is a rounding of ``[out, in]``, by their relative distance."""
    ours = module_weight.float()
    theirs = torch.from_numpy(np.ascontiguousarray(weight.T).astype(np.float32))
    return bool((ours - theirs).norm() <= _QUANTIZATION_DISTANCE * ours.norm())


def _equal(module_weight: torch.Tensor, weight: np.ndarray) -> bool:
    """Compare ``[out, in]`` with ``[in, out]``, in the coarser of the two precisions."""
    if weight.shape != (module_weight.shape[1], module_weight.shape[0]):
        return False
    ours = module_weight.float()
    theirs = torch.from_numpy(np.ascontiguousarray(weight.T).astype(np.float32))
    if torch.equal(ours, theirs):
        return True
    for coarse in (torch.float16, torch.bfloat16):
        if torch.equal(ours.to(coarse), theirs.to(coarse)) and torch.equal(
            theirs.to(coarse).float(), theirs
        ):
            return True
    return False


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
