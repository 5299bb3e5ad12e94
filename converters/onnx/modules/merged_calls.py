"""Finds operators that compute several equal layers: torch's optimizer merged their calls.

``torch.onnx.export(dynamo=True)`` computes once what two operators of equal inputs and weights
compute. It leaves in the metadata of the graph

1. all parameters that the model had (``graph_signature``): of a layer that was merged with
   another, neither its weight nor a node in its scope is left;
2. beside every operator the call that it was (``%linear : [num_users=1] = ...(args = (%x, ...``):
   where a reader of ``%linear`` was given ``%linear_1``, which no operator is, both are one now.
   Where calls of other operators were merged, those before them were if they have more readers
   with them than they had users.

A layer that is called twice with one input is not told: the model has no layer more than the graph.
"""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Container, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import onnx_ir as ir

_CALL = "pkg.torch.onnx.fx_node"
_CALLED = "pkg.torch.onnx.original_node_name"
_SCOPES = "pkg.torch.onnx.name_scopes"
_SIGNATURE = "pkg.torch.export.ExportedProgram.graph_signature"
_MADE = re.compile(r"%(\w+) : \[num_users=(\d+)\]")
_WEIGHT = re.compile(r"target='([^']+)\.weight'")
_NUMBER = re.compile(r"_(\d+)$")
# One of these after another of its kind is one, too, and of a cast to the same type none is left.
_REARRANGING = frozenset(
    [
        "Reshape",
        "Transpose",
        "Cast",
        "Slice",
        "Identity",
        "Squeeze",
        "Unsqueeze",
        "Expand",
        "Concat",
    ]
)
_NAMED = 3


@dataclass(frozen=True)
class MergedCalls:
    """What was merged.

    Attributes:
        nodes: ``id`` of operators that are several calls.
        lost: Modules with weights of which the graph has nothing: those others, or unused ones.
    """

    nodes: frozenset[int] = frozenset()
    lost: tuple[str, ...] = ()

    @property
    def reason(self) -> str:
        """Why such an operator has no slot."""
        names = ", ".join(self.lost[:_NAMED]) + (", ..." if len(self.lost) > _NAMED else "")
        return (
            "torch's exporter computes it and an equal layer of the same input by one operator "
            f"(of {names} the graph has none), so an adapter would act in both; export from torch "
            "with optimize=False"
        )

    def reason_of_lost(self, merged: Iterable[str]) -> str:
        """Why a lost module has no slot; ``merged``: the modules that the operators are."""
        return (
            "the graph has no operator of its own for it: the model does not use it, or torch's "
            f"exporter merged it with an equal layer ({', '.join(sorted(merged))}); export from "
            "torch with optimize=False"
        )


@dataclass(frozen=True)
class _Call:
    """The call that an operator was: its name, how many used it, and what it was given."""

    name: str
    users: int
    given: frozenset[str]


@dataclass
class _Readers:
    """Calls that read a call's values, by the names that they know them by."""

    own: set[str] = field(default_factory=set)  # who reads it by its own name
    equal: set[str] = field(default_factory=set)  # names of calls that were merged with it
    passed: list[set[str]] = field(default_factory=list)  # names of what was left out in between

    def add_passed(self, names: set[str]) -> None:
        """Add what one reader was given; readers of one name are readers of one call."""
        same = [known for known in self.passed if known & names]
        self.passed = [known for known in self.passed if not known & names]
        self.passed.append(names.union(*same))


def merged_calls(model: ir.Model) -> MergedCalls:
    """Return what torch's exporter merged, as far as the graph's metadata tells.

    Args:
        model: Any graph; one that recorded nothing has no answer.
    """
    nodes = list(model.graph.all_nodes())
    lost = _lost_modules(model, nodes)
    calls = {id(node): call for node in nodes if (call := _call(node)) is not None} if lost else {}
    left_out = _left_out(call.name for call in calls.values())
    known = {name for node in nodes for name in _names(node, calls)}
    merged: set[int] = set()
    certain: set[int] = set()
    for node in reversed(nodes):  # readers before what they read
        if (call := calls.get(id(node))) is None:
            continue
        readers = _readers(node, calls, known)
        told = len(readers.own) + len(readers.equal)
        sure = told + len(_twice(node, calls, certain)) > call.users
        if readers.equal and node.op_type not in _REARRANGING:
            sure = True
        users = told + len(readers.passed) + len(_twice(node, calls, merged))
        if readers.equal or users > call.users:
            merged.add(id(node))
            sure |= _kind(call.name) in left_out
        if sure:
            certain.add(id(node))
    return MergedCalls(frozenset(certain), lost)


def _names(node: ir.Node, calls: Mapping[int, _Call]) -> Iterator[str]:
    """Yield what an operator and its values are called in torch.

    An output of the graph may have the name of another call that was merged with the operator's.
    """
    call = calls.get(id(node))
    if call is not None:
        yield call.name
    for value in node.outputs:
        name = value.name or ""
        if call is None or _kind(name) != _kind(call.name):
            yield name


def _twice(node: ir.Node, calls: Mapping[int, _Call], merged: Container[int]) -> set[str]:
    """Return the readers of an operator that were merged with others, which read it, too."""
    name = calls[id(node)].name
    return {
        calls[id(reader)].name
        for value in node.outputs
        for reader in value.consumers()
        if id(reader) in merged and calls[id(reader)].name != name
    }


def _readers(node: ir.Node, calls: Mapping[int, _Call], known: Container[str]) -> _Readers:
    call = calls[id(node)]
    found = _Readers()
    for value in node.outputs:
        kinds = {_kind(call.name), _kind(value.name or "")}
        for reader, given in _given(value, calls):
            if reader == call.name:  # one call may be several operators
                continue
            strange = {name for name in given if name not in known}
            equal = {name for name in strange if _kind(name) in kinds and name != call.name}
            if call.name in given or (value.name in given and value.name in known):
                found.own.add(reader)
            elif equal:
                found.equal |= equal
            elif strange:
                found.add_passed(strange)
    return found


def _given(value: ir.Value, calls: Mapping[int, _Call]) -> Iterator[tuple[str, frozenset[str]]]:
    """Yield each reader of a value and the names of what it was given."""
    for reader in value.consumers():
        call = calls.get(id(reader))
        if call is not None:
            yield call.name, call.given
        elif (
            reader.outputs and _CALLED in reader.outputs[0].metadata_props
        ):  # an output that is equal to another
            name = reader.outputs[0].metadata_props[_CALLED]
            yield name, frozenset([name])
    if value.is_graph_output():
        called = value.metadata_props.get(_CALLED, value.name or "")
        yield called, frozenset([called])


def _call(node: ir.Node) -> _Call | None:
    recorded = node.metadata_props.get(_CALL, "")
    made = _MADE.match(recorded)
    if made is None:
        return None
    given = re.findall(r"%(\w+)", recorded[made.end() :])
    return _Call(made[1], int(made[2]), frozenset(given))


def _kind(name: str) -> str:
    """Return what was called: ``linear`` of ``linear_1``."""
    return _NUMBER.sub("", name)


def _left_out(names: Iterable[str]) -> set[str]:
    """Return kinds of calls whose numbers have gaps: of those, some are no operators now."""
    numbers: dict[str, set[int]] = defaultdict(set)
    for name in names:
        number = _NUMBER.search(name)
        numbers[_kind(name)].add(int(number[1]) if number else 0)
    return {kind for kind, found in numbers.items() if len(found) <= max(found)}


def _lost_modules(model: ir.Model, nodes: Iterable[ir.Node]) -> tuple[str, ...]:
    """Return modules with weights that the model had and of which the graph has nothing."""
    signature = {**model.metadata_props, **model.graph.metadata_props}.get(_SIGNATURE, "")
    modules = [
        path
        for path in dict.fromkeys(_WEIGHT.findall(signature))
        if f"{path}.weight" not in model.graph.initializers
    ]
    if not modules:
        return ()
    entered: set[str] = set()
    for node in nodes:
        with suppress(ValueError, SyntaxError):
            entered.update(map(str, ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))))
    return tuple(path for path in modules if path not in entered)
