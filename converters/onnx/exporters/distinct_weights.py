"""Stored values as ONNX Runtime's converter to halves takes them: of distinct names.

Branches may each have values of the same name; the converter ends at the second.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from converters.onnx.graph.functions import nodes_of

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto


def make_weights_distinct(model: ModelProto) -> None:
    """Give each stored value of a graph inside another a name of its own, in place."""
    graphs = list(_all_graphs(model.graph))
    taken = {value.name for graph in graphs for value in (*graph.input, *graph.initializer)}
    taken.update(name for node in nodes_of(model.graph.node) for name in node.output)
    stored: set[str] = set()
    for graph in graphs:
        for weight in graph.initializer:
            if weight.name in stored:
                name, number = weight.name, 1
                while (new := f"{name}_{number}") in taken:
                    number += 1
                taken.add(new)
                weight.name = new
                _read_as(graph, name, new)
            stored.add(weight.name)


def _read_as(graph: GraphProto, name: str, new: str) -> None:
    """Let a graph, and those inside that have no value of this name, read another."""
    for value in graph.output:
        if value.name == name:
            value.name = new
    for node in graph.node:
        for position, read in enumerate(node.input):
            if read == name:
                node.input[position] = new
        for inside in _inside(node):
            if all(value.name != name for value in (*inside.input, *inside.initializer)):
                _read_as(inside, name, new)


def _all_graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Return a graph and all that are inside it, each before what is inside it."""
    yield graph
    for node in graph.node:
        for inside in _inside(node):
            yield from _all_graphs(inside)


def _inside(node: NodeProto) -> Iterator[GraphProto]:
    """Return the graphs inside an operator, such as the branches of ``If``."""
    for entry in node.attribute:
        yield from entry.graphs
        if entry.HasField("g"):
            yield entry.g
