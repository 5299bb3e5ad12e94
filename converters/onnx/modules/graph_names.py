"""What the modules of a graph are called, where no checkpoint is there to tell.

The first of these that gives a name:

1. the name it had before its weight was stored otherwise (`keep_names`), and the module path that
   ``torch.onnx.export(dynamo=True)`` records on its nodes;
2. the initializer's name, where it is a parameter's: ``encoder.layer.0.query.weight``;
3. the node's name, where it is a path: ``/encoder/layer.0/query/MatMul``;
4. the name of the bias that is added to its product, where it is a parameter's;
5. the initializer's name, whatever it is, unless it is anonymous (``onnx::MatMul_1234``);
6. what it is (`linear`, `embedding`, `conv`) and its number.

One weight has one name wherever it is used, unless the exporter recorded several modules that share
it, or the paths of its nodes are of several; TorchScript's exporter calls the second call of ``up``
``up_1``, and may store a weight of its own for it. Two weights that come to the same name get the
names of their nodes added. A weight that is an embedding's too is the output head, and what looks
its rows up is never called ``lm_head``.
"""

from __future__ import annotations

import ast
import hashlib
import itertools
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.constant_value import Constant
from converters.onnx.graph.constants import constant
from converters.onnx.graph.site import Site
from converters.onnx.modules.bias_names import named_by_bias
from loraport.adapter import ModuleKind
from loraport.naming import is_module_path

HEAD = "lm_head"
_SCOPES = "pkg.torch.onnx.name_scopes"
_CLASSES = "pkg.torch.onnx.class_hierarchy"
_MODULE = "loraport.module"
# What quantizers and exporters add to the name of a weight.
_ENDINGS = re.compile(
    r"(_quantized|_Q\d+(G\d+)?|_DequantizeLinear|\.qweight|_qweight|_transposed|\.MatMul|_fp16|_[Bb]nb4)+$"
)
# What ONNX Runtime's optimizer, and tf2onnx, add to the name of a weight that they multiply by
# the factors of a normalization behind it.
_FOLDED = re.compile(
    r"^((ConvBnFusion_W|ConvMulFusion_W|MatMulBnFusion_GemmB)_)+|_weights_fused_bn$"
)
# What ONNX Runtime's optimizer adds to the name of a node: ``/q_proj/MatMul/MatMulScaleFusion/``,
# ``fused /fc/Gemm``.
_FUSED = re.compile(r"^fused |/\w*Fusion/?(_token_\d+)?$")
_ANONYMOUS = re.compile(
    r"(onnx::\w+_\d+|\d+|val_\d+|(.*[/._])?[Cc]onst(ant)?(?![A-Za-z])\w*(:\d+)?|_v_\d+|t_\d+)"
)
# What TorchScript's exporter adds to the name of a module that it meets again.
_AGAIN = re.compile(r"(_\d+)+$")


_PIECE = 256  # rows of an embedding that are compared at a time

# What a weight is called, what it is, and the module that the exporter recorded.
_Key = tuple[str, ModuleKind, str]
# What tells weights apart: kind, features and a hash of the values.
_Weight = tuple[ModuleKind, int, int, bytes]


@dataclass(frozen=True, eq=False)
class NamedSite:
    """A site and what its module is called."""

    path: str
    site: Site


def name_sites(sites: Sequence[Site], others: Sequence[Site] = ()) -> list[NamedSite]:
    """Name sites of a graph; sites of one weight have one name.

    Args:
        sites: What is named.
        others: The graph's other sites: a weight of an embedding among them is the head's, too.
    """
    weights = _Weights()
    groups = _by_weight(sites, weights)
    known = (*groups, *_by_weight(others, weights))
    embedded = {key[0] for key in known if key[1] is ModuleKind.EMBEDDING}
    readers: dict[tuple[str, ModuleKind], set[str]] = defaultdict(set)
    for stored, kind, path in groups:
        readers[stored, kind].add(path)
    names: dict[_Key, str] = {}
    for number, (key, members) in enumerate(groups.items()):
        tied = key[1] is ModuleKind.LINEAR and key[0] in embedded
        names[key] = _name(members, tied, readers[key[:2]]) or f"{key[1].value}_{number}"
    _tell_apart(names, groups, weights)
    found = {id(site): names[key] for key, members in groups.items() for site in members}
    return [NamedSite(found[id(site)], site) for site in sites]


def folded(named: Iterable[NamedSite]) -> list[str]:
    """Return modules whose weights in the graph are not their own: computed by the exporter.

    Most often a normalization was folded in. A kernel lost its name then, though the graph knows
    the module (a matrix loses it when it is turned, too), or its name says so, or the exporter
    recorded the normalization as what computes the product, or it made a bias where there was
    none (``conv.weight_bias``).
    """
    found = []
    for entry in named:
        site = entry.site
        known = entry.path.rpartition("_")[0] != site.kind.value  # not by its number
        nameless = (
            site.kind is ModuleKind.CONV
            and _ANONYMOUS.fullmatch(_stored_name(site))
            and not _recorded_path(site.node)
        )
        made = nameless or _has_folded_name(site) or _has_made_bias(site)
        if known and (made or _is_normalization(site.node)):
            found.append(entry.path)
    return list(dict.fromkeys(found))


def _has_folded_name(site: Site) -> bool:
    """Tell whether a weight has the name of one that another was multiplied into."""
    weight = weight_of(site)
    return weight is not None and _FOLDED.search(_ENDINGS.sub("", weight.name)) is not None


def _has_made_bias(site: Site) -> bool:
    """Tell whether a product's bias has the name that onnxscript's fusion gives a new one.

    Quantizers keep both names, and put what they round the bias with before it.
    """
    weight = weight_of(site)
    if weight is None:
        return False
    made = f"{_ENDINGS.sub('', weight.name)}_bias"
    constants = (constant(value) for value in site.node.inputs)
    return any(known and _ENDINGS.sub("", known.name) == made for known in constants)


def keep_names(before: Sequence[NamedSite], after: Iterable[Site]) -> None:
    """Note on operators that a quantizer wrote what their modules were called before.

    Args:
        before: The sites of the graph that it was given.
        after: Those of what it made of it. Both are told by what their outputs are called, which
            quantizers keep, else by what their weights are.
    """
    named: dict[str | None, set[str]] = defaultdict(set)  # subgraphs have values of one name
    for entry in before:
        named[entry.site.y.name].add(entry.path)
    outputs = {name: next(iter(paths)) for name, paths in named.items() if len(paths) == 1}
    stored: dict[tuple[str, ModuleKind], set[str]] = defaultdict(set)
    for entry in before:
        stored[_stored_name(entry.site), entry.site.kind].add(entry.path)
    left = []
    for site in after:
        if site.y.name in outputs:
            path = site.node.metadata_props[_MODULE] = outputs[site.y.name]
            others = stored[_stored_name(site), site.kind] - {path}
            if others:  # with such a weight, too: what is left is theirs
                stored[_stored_name(site), site.kind] = others
        else:
            left.append(site)
    for site in left:
        found = stored[_stored_name(site), site.kind]
        if len(found) == 1 and weight_of(site) is not None:
            site.node.metadata_props[_MODULE] = next(iter(found))


def _by_weight(sites: Iterable[Site], weights: _Weights) -> dict[_Key, list[Site]]:
    groups: dict[_Key, list[Site]] = defaultdict(list)
    calls: dict[tuple[str, ModuleKind], list[list[Site]]] = defaultdict(list)
    for number, site in enumerate(sites):
        weight = weight_of(site)
        name = weight.name if weight else f"?{number}"
        path = site.node.metadata_props.get(_MODULE) or _recorded_path(site.node)
        called = "" if path else _called(site.node)
        if called and _ANONYMOUS.fullmatch(name):  # a copy was made for every call
            known = calls[called, site.kind]
            same = next((group for group in known if weights.same(group[0], site)), None)
            if same is not None:
                same.append(site)
                continue
        path = path or called
        # One weight is read as it lies and transposed, or subgraphs have weights of one name.
        others, first = itertools.count(1), name
        while (found := groups.get((name, site.kind, path))) and not weights.same(found[0], site):
            name = f"{first}/{next(others)}"
        group = groups[name, site.kind, path]
        if not group:
            calls[called, site.kind].append(group)
        group.append(site)
    return groups


def tied_sites(named: Iterable[NamedSite]) -> tuple[tuple[str, ...], ...]:
    """Return groups of modules that share one weight: an embedding and its output head.

    Exporters store the weight a second time for the head, transposed: equal values are one weight.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    entries = list(named)
    tables: dict[tuple[int, int], list[Site]] = defaultdict(list)  # of a graph's many sites, a few
    for entry in entries:
        if entry.site.kind is ModuleKind.EMBEDDING:
            tables[entry.site.in_features, entry.site.out_features].append(entry.site)
    for entry in entries:
        weight = weight_of(entry.site)
        if weight is None:
            continue
        alike = tables[entry.site.out_features, entry.site.in_features]
        copies = (each for each in alike if _is_table_of(each, entry.site))
        table = weight_of(first) if (first := next(copies, None)) is not None else None
        group = groups[(table or weight).name]
        if entry.path not in group:
            group.append(entry.path)
    return tuple(tuple(paths) for paths in groups.values() if len(paths) > 1)


def _is_table_of(table: Site, head: Site) -> bool:
    """Tell whether an embedding's rows ``[vocab, dim]`` are what a head ``[dim, vocab]`` has.

    Their shapes are the same.
    """
    if head.kind is not ModuleKind.LINEAR or table.quantized or head.quantized:
        return False
    rows, columns = table.weight(), head.weight()
    starts = range(0, len(rows), _PIECE)  # a first piece tells most apart
    return all(
        np.array_equal(rows[start : start + _PIECE], columns[:, start : start + _PIECE].T)
        for start in starts
    )


def weight_of(site: Site) -> Constant | None:
    """Return the operator's largest constant: its weight as it is stored, packed ones in a line."""
    found = [known for value in site.node.inputs if (known := constant(value)) is not None]
    matrices = [known for known in found if len(known.shape) >= 2]
    return max(matrices or found, key=lambda known: np.prod(known.shape), default=None)


def _name(members: Sequence[Site], tied: bool, readers: Collection[str]) -> str:
    node = members[0].node
    stored = _stored_name(members[0])
    if _MODULE in node.metadata_props:
        return node.metadata_props[_MODULE]
    path = _recorded_path(node)
    named = ""
    if stored.endswith(".weight") and not tied and is_module_path(stored):
        named = _ENDINGS.sub("", stored.removesuffix(".weight"))
    if named.rpartition(".")[2] == HEAD and members[0].kind is ModuleKind.EMBEDDING:
        named = stored = ""  # the other reader's name
    if path:
        # Functions are recorded as the module that calls them, with a weight of another.
        return named if named.startswith(f"{path}.") else path
    # Another module reads the weight, too, where the one that it is called by does.
    if named and not (named in readers and _called(node) not in ("", named)):
        return named
    path = _path(_scopes(node))
    if path and is_module_path(path):
        return path
    if tied:
        return HEAD
    if by_bias := named_by_bias(members):
        return by_bias
    if stored and not _ANONYMOUS.fullmatch(stored):
        return _clean_path(stored)
    return _clean_path(node.name) if node.name else ""


def _scopes(node: ir.Node) -> list[str]:
    """Return the parts of a node's path but for its own name: ``/net/net.0/MatMul``."""
    scopes = _FUSED.sub("", node.name or "").split("/")[:-1]
    return [re.sub(r"[^\w.-]", "_", part).strip(".") for part in scopes]


def _path(parts: Sequence[str]) -> str:
    """Join scopes; a part of a sequence says whose it is (``net``, ``net.0``)."""
    return ".".join(
        part
        for part, following in itertools.zip_longest(parts, parts[1:], fillvalue="")
        if part and not following.startswith(f"{part}.")
    )


def _called(node: ir.Node) -> str:
    """Return the module that a node's path says was called, whichever call it is."""
    if not _FUSED.sub("", node.name or "").startswith("/"):  # as TorchScript's exporter begins them
        return ""
    return _path([_AGAIN.sub("", part) for part in _scopes(node)])


def _stored_name(site: Site) -> str:
    """Return what the weight is called, without what quantizers and exporters add."""
    weight = weight_of(site)
    return _FOLDED.sub("", _ENDINGS.sub("", weight.name)) if weight else ""


def _recorded_path(node: ir.Node) -> str:
    """Return the module in whose ``forward`` torch met the operator."""
    path = "" if _is_normalization(node) else _recorded(node, _SCOPES)
    return path if is_module_path(path) else ""


def _is_normalization(node: ir.Node) -> bool:
    """Tell whether torch met the operator in a normalization that a product was fused with."""
    return "batchnorm" in _recorded(node, _CLASSES).rpartition(".")[2].lower()


def _recorded(node: ir.Node, key: str) -> str:
    """Return what the exporter recorded of the module around an operator."""
    try:
        entries = ast.literal_eval(node.metadata_props.get(key, "[]"))
    except (ValueError, SyntaxError):
        return ""
    return str(entries[-2]) if isinstance(entries, list) and len(entries) > 1 else ""


def _tell_apart(
    names: dict[_Key, str], groups: Mapping[_Key, list[Site]], weights: _Weights
) -> None:
    """Give different weights different names, in place; equal ones are one module called twice."""
    claimed: dict[str, list[_Key]] = defaultdict(list)
    for key, name in names.items():
        claimed[name].append(key)
    taken = set(claimed)
    for name, keys in claimed.items():
        if len(keys) == 1:
            continue
        modules: dict[_Weight, list[_Key]] = defaultdict(list)
        for key in keys:
            modules[weights.of(groups[key][0])].append(key)
        if len(modules) == 1:
            continue
        for number, module in enumerate(modules.values()):
            leaf = _clean((groups[module[0]][0].node.name or "").rpartition("/")[2])
            distinct = f"{name}.{leaf or number}"
            while distinct in taken:
                distinct = f"{distinct}_{number}"
            taken.add(distinct)
            names.update(dict.fromkeys(module, distinct))


def _reads_the_same(one: Site, other: Site) -> bool:
    """Tell whether equal operators read the very same constants, as branches and calls do."""
    first, second = one.node, other.node
    if (first.domain, first.op_type) != (second.domain, second.op_type):
        return False
    if {**first.attributes} != {**second.attributes}:
        return False
    fixed = [
        [
            (number, id(value))
            for number, value in enumerate(node.inputs)
            if constant(value) is not None
        ]
        for node in (first, second)
    ]
    return bool(fixed[0]) and fixed[0] == fixed[1]


class _Weights:
    """Tells whether sites compute one module; each weight is read once."""

    def __init__(self) -> None:
        self._known: dict[int, _Weight] = {}

    def same(self, one: Site, other: Site) -> bool:
        """Tell whether both have the same weight; they are read only where shapes are the same."""
        shapes = [(site.kind, site.in_features, site.out_features) for site in (one, other)]
        if one is other or _reads_the_same(one, other):
            return True
        return shapes[0] == shapes[1] and self.of(one) == self.of(other)

    def of(self, site: Site) -> _Weight:
        """Return what tells a site's weight from others."""
        if id(site) not in self._known:
            values = np.ascontiguousarray(site.weight())
            digest = hashlib.sha256(values.view(np.uint8).data).digest()
            self._known[id(site)] = (site.kind, site.in_features, site.out_features, digest)
        return self._known[id(site)]


def _clean_path(name: str) -> str:
    parts = re.split(r"[./]", name.removesuffix(":0"))
    return ".".join(_clean(part) for part in parts if part)


def _clean(part: str) -> str:
    return re.sub(r"[^\w-]", "_", part)
