"""Names of the inputs that slots add to a graph: nothing else in it may have them.

What is inside the graph gets another name; its inputs, outputs and constants keep theirs.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from itertools import count
from pathlib import Path

import onnx_ir as ir

from converters.onnx.graph.provenance import recorded_provenance
from loraport.counts import counted
from loraport.errors import LoraportError
from loraport.naming import parse_slot_input, slot_a


def names_outside(graph: ir.Graph) -> dict[str, str]:
    """Return the names that a graph's users know → what has each."""
    outputs = {str(value.name): "an output" for value in graph.outputs}
    return outputs | {str(value.name): "an input" for value in graph.inputs}


def require_no_slots(model: ir.Model, file: Path) -> None:
    """Refuse a graph that has slots: those put in would stand beside what nothing fills any more.

    Slots are told by their inputs, which outlast the metadata that optimizers leave out.

    Args:
        model: As it was read.
        file: Which holds it.

    Raises:
        LoraportError: If it has the inputs of a slot.
    """
    names = [str(value.name) for value in model.graph.inputs]
    parsed = [slot for name in names if (slot := parse_slot_input(name)) is not None]
    found = [slot_a(slot) for slot, part in parsed if part == "lora_B" and slot_a(slot) in names]
    if not found:
        return
    known = recorded_provenance(model)
    made, remedy = "one", "export the model that they were put in, or rename what are no slots"
    if known is not None:
        made, remedy = f"one of {known[0]}'s", f"export {known[1]}, which they were put in"
    raise LoraportError(
        f"{file}: {found[0]}: expected a graph without an input that is a slot's, got {made} with "
        f"{counted(len(found), 'slot')}; {remedy}"
    )


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
    raise LoraportError(
        f"{name}: expected a graph without {found} of this name, got one with; rename it"
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
