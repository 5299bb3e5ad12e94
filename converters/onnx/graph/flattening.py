"""Lay the rows of a batch end to end, so that a slot's sum and product are one ``Gemm``.

``Gemm`` adds to a product what is there already, but takes matrices only. Where a graph computes
on ``[batch, sequence, features]``, whole regions of row-wise operators are put on
``[rows, features]``: values enter a region through a ``Reshape`` and leave it through another,
and no operator computes anything else than before. A region is flattened where that saves more
nodes than it costs: a slot in it saves one, a value that enters or leaves costs one.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.nodes import NodeChain
from converters.onnx.graph.row_wise import Leading, RowWise, leading_of, row_wise


@dataclass(frozen=True, eq=False)
class _Region:
    """Row-wise operators that hand rows to each other.

    Attributes:
        members: The operators, in the graph's order.
        entries: Values that come from elsewhere, in that order.
        exits: Values that are read elsewhere.
    """

    members: list[RowWise]
    entries: list[ir.Value]
    exits: list[ir.Value]


def flatten_rows(graph: ir.Graph, slotted: Collection[ir.Node]) -> None:
    """Put regions of a graph on rows, in place.

    Args:
        graph: The graph; the bodies of its control flow stay as they are.
        slotted: Operators that will have a slot.
    """
    wanted = {id(node) for node in slotted}
    for region in _regions(graph):
        saved = sum(id(member.node) in wanted for member in region.members)
        if saved > len(region.entries) + len(region.exits):
            _flatten(graph, region)


def _regions(graph: ir.Graph) -> Iterable[_Region]:
    """Return the connected groups of row-wise operators."""
    members = [found for node in graph if (found := row_wise(node)) is not None]
    group = list(range(len(members)))

    def root(number: int) -> int:
        while group[number] != number:
            group[number] = number = group[group[number]]
        return number

    touching: dict[int, int] = {}  # a row value's identity -> the first member that has it
    for number, member in enumerate(members):
        read = [member.node.inputs[index] for index in member.inputs]
        for value in (*read, *member.outputs):
            first = touching.setdefault(id(value), number)
            group[root(number)] = root(first)
    groups: dict[int, list[RowWise]] = {}
    for number, member in enumerate(members):
        groups.setdefault(root(number), []).append(member)
    return [_region(found) for found in groups.values()]


def _region(members: list[RowWise]) -> _Region:
    produced = {id(value) for member in members for value in member.outputs}
    reading = {(id(member.node), index) for member in members for index in member.inputs}
    entries: dict[int, ir.Value] = {}
    for member in members:
        for index in member.inputs:
            value = member.node.inputs[index]
            assert value is not None
            if id(value) not in produced:
                entries.setdefault(id(value), value)
    exits = [
        value
        for member in members
        for value in member.outputs
        if any((id(usage.node), usage.idx) not in reading for usage in value.uses())
    ]
    return _Region(members, list(entries.values()), exits)


def _flatten(graph: ir.Graph, region: _Region) -> None:
    place = {id(node): number for number, node in enumerate(graph)}
    first = min(region.entries, key=lambda value: place.get(id(value.producer()), -1))
    leading = leading_of(first)
    assert leading is not None
    rows = "*".join(leading)
    inside = {(id(member.node), index) for member in region.members for index in member.inputs}
    sizes = _sizes(graph, first)
    for value in region.exits:
        apart = _reshaped(graph, value, "apart", sizes)
        _hand_over(value, apart, lambda use: use not in inside)
        apart.shape = value.shape
    for value in region.entries:
        joined = _reshaped(graph, value, "rows", np.array([-1]))
        _hand_over(value, joined, lambda use: use in inside)
        joined.shape = _flat(value, rows, leading)
    for member in region.members:
        for value in member.outputs:
            value.shape = _flat(value, rows, leading)


def _sizes(graph: ir.Graph, value: ir.Value) -> ir.Value:
    """Return the first two dimensions of a value, as the graph computes them."""
    chain = NodeChain(f"{value.name}/leading", ir.DataType.INT64)
    index = chain.constant("index", np.array([0, 1]))
    whole = chain.add("shape", "Shape", [value])
    sizes = chain.add("sizes", "Gather", [whole, index], {"axis": ir.AttrInt64("axis", 0)})
    _put_after(graph, value, chain)
    return sizes


def _reshaped(
    graph: ir.Graph, value: ir.Value, name: str, sizes: np.ndarray | ir.Value
) -> ir.Value:
    """Return a value with other sizes before its features."""
    assert value.shape is not None
    chain = NodeChain(f"{value.name}/{name}", ir.DataType.INT64)
    features = np.array([value.shape[2]])
    if isinstance(sizes, np.ndarray):
        shape = chain.constant("shape", np.concatenate([sizes, features]))
    else:
        last = chain.constant("features", features)
        shape = chain.add("shape", "Concat", [sizes, last], {"axis": ir.AttrInt64("axis", 0)})
    result = chain.add("reshaped", "Reshape", [value, shape])
    result.type = value.type
    _put_after(graph, value, chain)
    return result


def _put_after(graph: ir.Graph, value: ir.Value, chain: NodeChain) -> None:
    producer = value.producer()
    if producer is None:
        graph.insert_before(graph[0], chain.nodes)
    else:
        graph.insert_after(producer, chain.nodes)


def _flat(value: ir.Value, rows: str, leading: Leading) -> ir.Shape:
    assert value.shape is not None
    if all(size.isdecimal() for size in leading):
        return ir.Shape([int(leading[0]) * int(leading[1]), value.shape[2]])
    return ir.Shape([rows, value.shape[2]])


def _hand_over(value: ir.Value, other: ir.Value, where: Callable[[tuple[int, int]], bool]) -> None:
    """Let readers of a value read another."""
    for usage in list(value.uses()):
        if usage.node is not other.producer() and where((id(usage.node), usage.idx)):
            usage.node.replace_input_with(usage.idx, other)
