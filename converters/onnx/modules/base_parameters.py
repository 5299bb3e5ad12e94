"""The base's own weights, for adapters whose tensors in the slots depend on them.

DoRA's gain is ``m / ||W + s B A||``, and trained tokens are told from the base's. The first of
these that has a weight gives it:

1. the base that the user names;
2. the bundle: its graph, where the weight is not quantized, or its base values;
3. the checkpoint that the bundle was exported from, as ``sources.json`` remembers it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from converters.onnx.graph.constants import constant
from converters.onnx.graph.provenance import recorded_slot
from converters.onnx.graph.site import Site
from converters.onnx.graph.source_graph import read_graph
from converters.onnx.modules.graph_names import name_sites
from converters.onnx.modules.slottable import SlottableModule
from converters.onnx.modules.weight_distance import allowed_distance, weight_distance
from converters.onnx.operators import find_site
from loraport.adapter import ModuleKind
from loraport.base.weights import StoredWeights
from loraport.bundle.base_values import BaseValues
from loraport.bundle.manifest import MODEL_FILE, Manifest
from loraport.bundle.slots import SlotMember
from loraport.bundle.sources import base_source
from loraport.errors import LoraportError
from loraport.fingerprint import hash_weight
from loraport.naming import bias_name, weight_name
from loraport.runtime.values import torch_of

_REMEDY = "give --base with the model that the bundle was exported from"


@dataclass(frozen=True, eq=False)
class _Place:
    """Where the graph computes a module.

    Attributes:
        sites: The operators that compute the slot's outputs side by side.
        member: The module's part of these.
    """

    sites: tuple[Site, ...]
    member: SlotMember

    @property
    def kind(self) -> ModuleKind:
        return self.sites[0].kind

    @property
    def quantized(self) -> bool:
        return any(site.quantized for site in self.sites)

    def columns(self) -> torch.Tensor:
        """Return the module's columns of the operators' weights, ``[in, out]``."""
        # Numpy has no bfloat16 that torch reads; float32 holds all of its values.
        own = np.ascontiguousarray(self._own([site.weight() for site in self.sites]), np.float32)
        return torch.from_numpy(own.copy())

    def rounds(self, weight: torch.Tensor) -> bool:
        """Tell whether the graph has a weight of the base, as far as its precision tells.

        Args:
            weight: As a checkpoint has it: a matrix may be stored either way around.
        """
        own, matrix = self.columns().numpy(), weight.flatten(1)
        allowed = max(allowed_distance(site) for site in self.sites)
        return any(
            weight_distance(_module(self.kind, rows), own) <= allowed for rows in (matrix, matrix.T)
        )

    def bias(self) -> torch.Tensor | None:
        """Return the module's part of what the operators add, if all add a constant."""
        added = [
            None if site.bias_input is None else constant(site.node.inputs[site.bias_input])
            for site in self.sites
        ]
        whole = [np.asarray(found.array()) for found in added if found is not None]
        return torch_of(np.array(self._own(whole))) if len(whole) == len(added) else None

    def _own(self, parts: list[np.ndarray]) -> np.ndarray:
        whole = parts[0] if len(parts) == 1 else np.concatenate(parts, -1)
        return whole[..., self.member.start : self.member.stop]


def _module(kind: ModuleKind, rows: torch.Tensor) -> SlottableModule:
    """Return a weight ``[out, in]`` as a module without a name."""
    out_features, in_features = rows.shape
    return SlottableModule(
        "", out_features, in_features, kind, lambda start, stop: rows[start:stop], None
    )


class BaseParameters:
    """Finds the base's weights; nothing is read before it is asked for.

    Args:
        bundle: The bundle's directory.
        manifest: Its manifest.
        base: What the user names as the base, see `resolve_base`.
    """

    def __init__(self, bundle: Path, manifest: Manifest, base: str | None = None) -> None:
        self._bundle = bundle
        self._manifest = manifest
        self._base = base
        self._stored: StoredWeights | None = None

    def weight(self, path: str, in_out: bool = False) -> torch.Tensor:
        """Return a module's weight.

        Args:
            path: The module.
            in_out: Return a square matrix as ``[in, out]``, whatever a checkpoint has: that is
                how the adapter says it is stored, rightly or not (transformers' ``Conv1D``).

        Raises:
            LoraportError: If no source has it, or it is another base's.
        """
        if self._base is None and (found := self._in_graph(path, in_out)) is not None:
            return found
        stored = self._checkpoint(path)
        weight = self._checked(path, stored(path), stored.base)
        if weight.dim() == 2 and len(weight) == weight.shape[1]:
            turned = self._is_in_out(path, weight) not in (None, in_out)
            return weight.T if turned else weight
        return weight

    def require_own(self, path: str) -> None:
        """Refuse a module whose weight in the graph is not the checkpoint's.

        Raises:
            LoraportError: If it is another, or no checkpoint is known.
        """
        source = self._base or base_source(self._bundle)
        if source is None:
            raise LoraportError(
                f"{path}: expected the module's own weight in the graph, got one that the exporter "
                f"computed, maybe with a normalization folded in; {_REMEDY}, which tells, or "
                "--ignore-fingerprint if the adapter belongs to this weight"
            )
        weight = self._checked(path, self._checkpoint(path)(path), source)
        place = self._places.get(path)
        if path in self._manifest.fingerprint.modules or place is None:
            return
        if not place.rounds(weight):
            raise LoraportError(
                f"{path}: expected the weight of {source}, rounded, got another in the graph: most "
                "often a normalization was folded in before it was rounded, and an adapter of the "
                "base does not fit there; export the model without folding, or pass "
                "--ignore-fingerprint if the adapter belongs to this weight"
            )

    def rounded(self, path: str) -> torch.Tensor | None:
        """Return a module's weight as the graph computes with it, if that is a rounding.

        Of a linear module ``[out, in]``, of an embedding ``[vocab, dim]``. What replaces rows of
        it is told from this one, so that they are what was trained.
        """
        if path not in self._places or not self._places[path].quantized:
            return None
        columns = self._places[path].columns()
        return columns if self._places[path].kind is ModuleKind.EMBEDDING else columns.T

    def is_rounded(self, path: str) -> bool:
        """Tell whether the graph has a module's weight rounded, with a slot or without."""
        if path in self._places:
            return self._places[path].quantized
        sites = [site for node in self._graph.all_nodes() if (site := find_site(node)) is not None]
        return any(entry.site.quantized for entry in name_sites(sites) if entry.path == path)

    def bias(self, path: str) -> torch.Tensor:
        """Return a module's bias.

        Raises:
            LoraportError: If neither the graph nor a known checkpoint has it.
        """
        if self._base is None and (found := self._bias_in_graph(path)) is not None:
            return found
        return self._checkpoint(path, "bias").parameter(bias_name(path))

    def _bias_in_graph(self, path: str) -> torch.Tensor | None:
        """Return the bias that the graph stores by its name, or that the operator adds."""
        value = self._graph.initializers.get(bias_name(path))
        if value is not None and (found := constant(value)) is not None:
            return torch_of(np.array(found.array()))
        return self._places[path].bias() if path in self._places else None

    def _checkpoint(self, path: str, what: str = "weight") -> StoredWeights:
        source = self._base or base_source(self._bundle)
        if source is None:
            raise LoraportError(
                f"{path}: expected the base's {what}, which this adapter depends on, got none: "
                f"the graph holds no exact one; {_REMEDY}"
            )
        if self._stored is None:
            self._stored = StoredWeights(source)
        return self._stored

    def is_copy(self, parameter: str, tensor: torch.Tensor) -> bool:
        """Tell whether a parameter that an adapter stores is the base's own.

        A weight that the base cannot be asked for is taken for another one.
        """
        path, _, leaf = parameter.rpartition(".")
        known = self._manifest.fingerprint.modules.get(path)
        if leaf == "weight" and known is not None:
            return hash_weight(tensor) == known
        try:
            own = self.weight(path) if leaf == "weight" else self._named(parameter)
        except LoraportError:
            return False
        return own.shape == tensor.shape and torch.equal(own.float(), tensor.to(own.dtype).float())

    def _named(self, parameter: str) -> torch.Tensor:
        """Return what the graph or the checkpoint has under a parameter's own name."""
        stored = None if self._base is not None else self._graph.initializers.get(parameter)
        if stored is None or stored.const_value is None:
            return self._checkpoint(parameter).parameter(parameter)
        return torch_of(np.array(stored.const_value.numpy()))

    def _checked(self, path: str, weight: torch.Tensor, source: str) -> torch.Tensor:
        known = self._manifest.fingerprint.modules.get(path)
        if known is not None and (got := hash_weight(weight)) != known:
            raise LoraportError(
                f"{path}: expected the weight that the bundle was exported with ({known[:12]}), "
                f"got another ({got[:12]}) in {source}; {_REMEDY}"
            )
        return weight

    @cached_property
    def _graph(self) -> ir.Graph:
        return read_graph(self._bundle / MODEL_FILE).graph

    @cached_property
    def _places(self) -> dict[str, _Place]:
        """Module path → the operators that compute it, and its part of them."""
        found: dict[str, dict[int, Site]] = defaultdict(dict)  # by the first output of each
        for node in self._graph.all_nodes():
            recorded = recorded_slot(node)
            site = find_site(node) if recorded is not None else None
            if recorded is not None and site is not None:
                found[recorded[0]][recorded[1]] = site
        return {
            path: _Place(tuple(site for _, site in sorted(found[slot.name].items())), member)
            for path, (slot, member) in self._manifest.slots.modules().items()
            if slot.name in found
        }

    def _in_graph(self, path: str, in_out: bool) -> torch.Tensor | None:
        for slot in self._manifest.slots.replacements:
            if slot.parameter == weight_name(path):
                value = torch_of(BaseValues(self._bundle)[slot.input])
                return value.T if slot.transposed else value
        if path not in self._places or self._places[path].quantized:
            return None
        site = self._places[path].sites[0]
        weight = self._places[path].columns()
        if site.kind is ModuleKind.EMBEDDING:
            return weight
        if site.kind is ModuleKind.CONV:
            own = site.in_features // site.groups
            return weight.T.reshape(weight.shape[1], own, *site.kernel)
        return weight if in_out else weight.T

    def _is_in_out(self, path: str, weight: torch.Tensor) -> bool | None:
        """Tell whether a square weight of the checkpoint is stored as the graph has it."""
        if path not in self._places or self._places[path].kind is not ModuleKind.LINEAR:
            return None
        own, stored = self._places[path].columns(), weight.float()
        return bool((own - stored).norm() < (own - stored.T).norm())
