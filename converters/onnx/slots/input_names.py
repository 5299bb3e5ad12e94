"""Names of the inputs that slots add to a graph: nothing else in it may have them.

What is inside the graph gets another name; its inputs, outputs and constants keep theirs.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import count

import onnx_ir as ir

from loraport.errors import LoraportError


def names_outside(graph: ir.Graph) -> dict[str, str]:
    """Return the names that a graph's users know → what has each."""
    outputs = {str(value.name): "an output" for value in graph.outputs}
    return outputs | {str(value.name): "an input" for value in graph.inputs}


def require_free(name: str, graph: ir.Graph, outside: dict[str, str]) -> None:
    """Refuse the name of an input where a graph has something else by it.

    Args:
        name: Of the input.
        graph: Which gets it.
        outside: See `names_outside`; from before the graph got any.

    Raises:
        LoraportError: If an input, an output or a constant has it.
    """
    found = outside.get(name, "a constant" if name in graph.initializers else None)
    if found is None:
        return
    remedy = "rename it"
    if found == "an input":
        remedy = "if it has slots already, export the model that they were put in; else rename it"
    raise LoraportError(
        f"{name}: expected a graph without {found} of this name, got one with; {remedy}"
    )


def rename_inner(graph: ir.Graph, names: Container[str | None]) -> None:
    """Give what is inside a graph and has one of the names another, in place.

    Args:
        graph: The graph, with what is inside its subgraphs.
        names: Of inputs that it got.
    """
    alike = [value for value in _inner(graph) if value.name in names]
    if not alike:
        return
    known = {*names_outside(graph), *graph.initializers, *(value.name for value in _inner(graph))}
    for value in alike:
        name = value.name
        value.name = next(new for n in count() if (new := f"{name}/inner_{n}") not in known)
        known.add(value.name)


def _inner(graph: ir.Graph) -> Iterator[ir.Value]:
    for node in graph.all_nodes():
        yield from node.outputs
    for subgraph in graph.subgraphs():
        yield from subgraph.inputs
        inputs = {id(value) for value in subgraph.inputs}
        yield from (v for v in list(subgraph.initializers.values()) if id(v) not in inputs)
