"""The modules of a graph whose base nobody gave: each weight that can carry a slot is one."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence

import numpy as np
import onnx_ir as ir
import torch

from converters.onnx.graph.constants import constant
from converters.onnx.graph.site import Site
from converters.onnx.modules.graph_names import NamedSite, weight_of
from converters.onnx.modules.matching import Match, Unmatched
from converters.onnx.modules.module_parts import SplitModule
from converters.onnx.modules.slottable import SlottableModule
from loraport.adapter import ModuleKind
from loraport.fingerprint import BaseFingerprint, hash_rows
from loraport.naming import weight_name

_BLOCK_BYTES = 64 << 20
# A rounded weight is not the base's, so only these say which base it is.
_EXACT = (ir.DataType.FLOAT, ir.DataType.DOUBLE)


class GraphModules:
    """Finds the module of a site by the name that the graph itself has for it.

    Args:
        named: All sites of the graph with their names.
    """

    def __init__(self, named: Sequence[NamedSite]) -> None:
        self._paths = {id(entry.site.node): entry.path for entry in named}

    def match(self, site: Site) -> Match | Unmatched:
        """Return the site's one module; its weight is not read."""
        path = self._paths[id(site.node)]

        def rows(start: int, stop: int) -> torch.Tensor:
            part = np.ascontiguousarray(site.weight()[:, start:stop].T, np.float32)
            return torch.from_numpy(part)

        module = SlottableModule(path, site.out_features, site.fan_in, site.kind, rows, path)
        return (module,)

    def split(self, sites: Sequence[Site], seen: Container[str]) -> Sequence[SplitModule]:
        """Return none: every site is a module."""
        del sites, seen
        return ()


def fingerprint_graph(named: Iterable[NamedSite], paths: Iterable[str]) -> BaseFingerprint:
    """Fingerprint the weights of a graph as the base's own checkpoint would be.

    A parameter that kept its name is hashed as it is stored, any other linear weight as PyTorch
    stores it, ``[out, in]``. Weights in half precision or quantized are left out: the base they
    were rounded from cannot be told from them. Each is read in pieces and none is kept.
    """
    wanted = set(paths)
    hashes: dict[str, str] = {}
    for entry in named:
        site = entry.site
        if entry.path in wanted and entry.path not in hashes and _is_exact(site):
            hashes[entry.path] = _hash(entry)
    return BaseFingerprint(hashes)


def _is_exact(site: Site) -> bool:
    return not site.quantized and site.dtype in _EXACT


def _hash(entry: NamedSite) -> str:
    site = entry.site
    stored = _stored_parameter(entry)
    if stored is not None:
        shape = tuple(stored.shape.numpy())
        return hash_rows(shape, _pieces(stored.numpy, transposed=False))
    if site.kind is ModuleKind.EMBEDDING:
        shape = (site.in_features, site.out_features)
        return hash_rows(shape, _pieces(site.weight, transposed=False))
    shape = (site.out_features, site.in_features // site.groups, *site.kernel)
    return hash_rows(shape, _pieces(site.weight, transposed=True))


def _stored_parameter(entry: NamedSite) -> ir.TensorProtocol | None:
    """Return the initializer that is the module's ``weight``, if the graph has it by its name."""
    weight = weight_of(entry.site)
    if weight is None or weight.name != weight_name(entry.path):
        return None
    for value in entry.site.node.inputs:
        known = constant(value)
        root = value
        while known is not None and known.name == weight.name and root is not None:
            if root.const_value is not None:
                return root.const_value
            node = root.producer()
            root = node.inputs[0] if node is not None and node.inputs else None
    return None


def _pieces(load: object, *, transposed: bool) -> Iterator[np.ndarray]:
    """Yield a matrix's rows, or its transpose's, as float32; it is mapped anew for each piece."""
    assert callable(load)
    first = load()
    rows = first.shape[1] if transposed else first.shape[0]
    row_bytes = max(first.nbytes // max(rows, 1), 1)
    del first
    step = max(_BLOCK_BYTES // row_bytes, 1)
    for start in range(0, rows, step):
        whole = load()
        piece = whole[:, start : start + step].T if transposed else whole[start : start + step]
        yield np.ascontiguousarray(piece, np.float32)
