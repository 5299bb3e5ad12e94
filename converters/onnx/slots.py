"""Put slots into a graph that already exists; weights are neither read nor rewritten.

For each site ``y = x W`` with matched modules:

1. graph inputs ``NAME.lora_A [in, r]`` and ``NAME.lora_B [r, out]`` with a symbolic rank of
   the slot's own, and initializers of the same names: rank-1 zeros, so that the graph without
   any adapter is the base;
2. ``y' = y + (x A) B``, and every reader of ``y`` reads ``y'``; a graph output keeps its name.

Sites that compute the same modules (a module called twice) share one slot.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from converters.onnx.matching import Match, Matcher, Unmatched
from converters.onnx.modules import LinearModule
from converters.onnx.operators import find_site
from converters.onnx.site import Site
from loraport.bundle.slots import Slot, SlotMember, SlotTable
from loraport.errors import LoraportError
from loraport.naming import packed_slot

# Overridable initializers exist from this IR version on.
_MINIMUM_IR_VERSION = 4


@dataclass(frozen=True)
class SlottedModel:
    """A graph with slots.

    Attributes:
        model: The graph, changed in place.
        slots: What was put in.
        unslotted: Module path → why it has no slot.
    """

    model: ir.Model
    slots: SlotTable
    unslotted: Mapping[str, str]


def insert_slots(
    model: ir.Model,
    modules: Mapping[str, LinearModule],
    *,
    exclude: Callable[[str], str | None] = lambda path: None,  # noqa: ARG005
) -> SlottedModel:
    """Put a slot beside every linear operator whose modules are known.

    Args:
        model: Any ONNX model; changed in place.
        modules: The base's linear modules by path.
        exclude: Gives the reason for leaving a module without a slot, or ``None``.

    Raises:
        LoraportError: If no operator could be matched at all.
    """
    matcher = Matcher(modules)
    table: dict[str, Slot] = {}
    unslotted: dict[str, str] = {}
    reasons: list[str] = []
    for node in list(model.graph):
        site = find_site(node)
        if site is None:
            continue
        matched = matcher.match(site)
        if isinstance(matched, Unmatched):
            reasons.append(f"{node.name or node.op_type}: {matched.reason}")
            continue
        excluded = {module.path: exclude(module.path) for module in matched}
        if any(excluded.values()):
            unslotted.update({path: reason for path, reason in excluded.items() if reason})
            continue
        slot = _slot(site, matched)
        if slot.name not in table:
            _add_inputs(model.graph, slot, site)
            table[slot.name] = slot
        _add_nodes(model.graph, slot, site)
    if not table:
        raise LoraportError(
            "slots: expected linear operators that match the base's modules, got none"
            + "".join(f"\n  - {reason}" for reason in reasons[:20])
        )
    covered = {member.module_path for slot in table.values() for member in slot.members}
    for path in modules:
        if path not in covered:
            unslotted.setdefault(path, "no operator of the graph computes it by itself")
    model.ir_version = max(model.ir_version or 0, _MINIMUM_IR_VERSION)
    return SlottedModel(model, SlotTable(tuple(table.values())), unslotted)


def require_slot_inputs(model: ir.Model, slots: SlotTable) -> None:
    """Turn the slots' overridable initializers into plain required inputs, in place."""
    for name in slots.inputs():
        model.graph.initializers.pop(name)


def _slot(site: Site, modules: Match) -> Slot:
    members = []
    start = 0
    for module in modules:
        members.append(SlotMember(module.path, start, start + module.out_features))
        start += module.out_features
    return Slot(
        name=packed_slot(tuple(module.path for module in modules)),
        in_features=site.in_features,
        out_features=site.out_features,
        dtype=site.dtype.name,
        members=tuple(members),
    )


def _add_inputs(graph: ir.Graph, slot: Slot, site: Site) -> None:
    rank = f"{slot.name}.rank"
    shapes: dict[str, tuple[list[int | str], tuple[int, int]]] = {
        slot.input_a: ([slot.in_features, rank], (slot.in_features, 1)),
        slot.input_b: ([rank, slot.out_features], (1, slot.out_features)),
    }
    for name, (shape, default_shape) in shapes.items():
        value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(site.dtype))
        value.const_value = ir.tensor(np.zeros(default_shape, site.dtype.numpy()), name=name)
        graph.inputs.append(value)
        graph.register_initializer(value)


def _add_nodes(graph: ir.Graph, slot: Slot, site: Site) -> None:
    inputs = {value.name: value for value in graph.inputs}
    # A module called twice has two sites, so node names carry the operator's name too.
    stem = f"{slot.name}.lora/{site.node.name or site.y.name}"
    hidden = ir.node("MatMul", [site.x, inputs[slot.input_a]], name=f"{stem}/A", num_outputs=1)
    delta = ir.node(
        "MatMul", [hidden.outputs[0], inputs[slot.input_b]], name=f"{stem}/B", num_outputs=1
    )
    added = ir.node("Add", [site.y, delta.outputs[0]], name=f"{stem}/Add", num_outputs=1)
    for node in (hidden, delta, added):
        node.outputs[0].name = f"{node.name}/output_0"
        node.outputs[0].type = ir.TensorType(site.dtype)
    result = added.outputs[0]
    result.shape = site.y.shape
    if site.y.is_graph_output():
        result.name, site.y.name = site.y.name, f"{site.y.name}/base"
    readers = [usage for usage in site.y.uses() if usage.node is not added]
    for usage in readers:
        usage.node.replace_input_with(usage.idx, result)
    for index, output in enumerate(graph.outputs):
        if output is site.y:
            graph.outputs[index] = result
    graph.insert_after(site.node, (hidden, delta, added))
