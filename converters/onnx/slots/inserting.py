"""Put slots into a graph that already exists; weights are neither read nor rewritten.

For each site ``y = x W`` with matched modules:

1. graph inputs ``NAME.lora_A`` and ``NAME.lora_B`` with a symbolic rank of the slot's own (and
   ``NAME.lora_gain``, ``NAME.lora_bias`` where wanted), and initializers of the same names that
   change nothing: rank-1 zeros, so that the graph without any adapter is the base;
2. the slot's nodes, as `slot_nodes` says; every reader of ``y`` reads theirs, and a graph output
   keeps its name.

Sites that compute the same modules (a module called twice) share one slot, and so do those that
compute a module in parts: each takes its columns of ``B``, gain and bias, see `slot_parts`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir
import torch

from converters.onnx.graph.flattening import flatten_rows
from converters.onnx.graph.integer_constants import store_integer_constants
from converters.onnx.graph.provenance import record_slot
from converters.onnx.graph.site import Site
from converters.onnx.modules.holders import Holders
from converters.onnx.modules.matching import Match, Matcher, SiteMatcher, Unmatched
from converters.onnx.modules.slottable import SlottableModule
from converters.onnx.operators import find_site
from converters.onnx.slots.controls import Controls
from converters.onnx.slots.input_names import names_outside, rename_inner, require_free
from converters.onnx.slots.replacing import make_replaceable
from converters.onnx.slots.slot_nodes import add_slot_nodes
from converters.onnx.slots.slot_parts import Columns, SlotParts
from loraport.adapter import ModuleKind
from loraport.bundle.slots import Slot, SlotInput, SlotMember, SlotTable
from loraport.errors import LoraportError, Problems
from loraport.naming import bias_name, packed_slot, slot_gain
from loraport.option_checks import check_names, check_switches
from loraport.plain_options import store_plain

# Overridable initializers exist from this IR version on.
_MINIMUM_IR_VERSION = 4

_FIXED_BIAS = "this operator adds a bias that no gain may scale and that cannot be taken out of it"

VARIANTS = ("lora", "gain", "bias", "embedding", "conv")


@dataclass(frozen=True)
class SlotOptions:
    """What a graph's slots can take.

    Attributes:
        variants: Of `VARIANTS`: ``lora`` on linear modules, ``embedding`` and ``conv`` on those,
            ``gain`` (DoRA) and ``bias`` (LoRA bias) on every slot.
        strength: An input ``lora_strength`` ``[1]`` that scales every update.
        per_row: An input ``adapter_ids`` ``[batch]``: every row of a batch has its own adapter.
        replace: Modules, parameters or leaves of them that adapters may store as a whole.
    """

    variants: tuple[str, ...] = ("lora",)
    strength: bool = False
    per_row: bool = False
    replace: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        store_plain(self)
        problems = Problems()
        check_switches(problems, self, "strength", "per_row")
        check_names(problems, "replace", self.replace)
        if check_names(problems, "slots", self.variants):
            self._check_variants(problems)
        if self.replace and (self.per_row or self.strength):
            problems.add(
                "replace",
                "no strength input and no adapters per row: a whole parameter is one for all",
                "both",
                "export twice, or leave one out",
            )
        problems.raise_if_any("slot options cannot be used")

    def _check_variants(self, problems: Problems) -> None:
        for variant in self.variants:
            if variant not in VARIANTS:
                problems.add("slots", f"of {', '.join(VARIANTS)}", repr(variant))
        if not {"lora", "embedding", "conv"} & set(self.variants):
            problems.add("slots", "lora, embedding or conv", "none of them")
        if self.per_row and {"gain", "bias"} & set(self.variants):
            problems.add("per-row", "slots lora, embedding or conv", ",".join(self.variants))

    def serves(self, kind: ModuleKind) -> bool:
        """Tell whether modules of this kind get slots."""
        return ("lora" if kind is ModuleKind.LINEAR else kind.value) in self.variants


@dataclass(frozen=True)
class SlottedModel:
    """A graph with slots.

    Attributes:
        model: The graph, changed in place.
        slots: What was put in.
        unslotted: Module or parameter path → why it has no slot; name of the input for a gain
            that was asked for → why a slot has none.
        base_values: Graph input → the base's value of a parameter that can be replaced.
    """

    model: ir.Model
    slots: SlotTable
    unslotted: Mapping[str, str]
    base_values: Mapping[str, torch.Tensor] = field(default_factory=dict)


def insert_slots(
    model: ir.Model,
    modules: Mapping[str, SlottableModule],
    options: SlotOptions | None = None,
    *,
    matcher: SiteMatcher | None = None,
    exclude: Callable[[str], str | None] = lambda path: None,  # noqa: ARG005
) -> SlottedModel:
    """Put a slot beside every operator whose modules are known.

    Args:
        model: Any ONNX model; changed in place.
        modules: The base's modules by path.
        options: What the slots can take; LoRA on linear modules unless told.
        matcher: Finds a site's modules; by names and values among ``modules`` unless told.
        exclude: Gives the reason for leaving a module without a slot, or ``None``.

    Raises:
        LoraportError: If no operator could be matched at all.
    """
    options = options or SlotOptions()
    for subgraph in model.graph.subgraphs():
        # A subgraph has its model's opset, which its nodes cannot look up from where they are.
        subgraph.opset_imports.update(model.graph.opset_imports)
    wanted = {path: module for path, module in modules.items() if options.serves(module.kind)}
    matcher = matcher or Matcher(wanted)
    outside = names_outside(model.graph)
    controls = Controls(model.graph, strength=options.strength, per_row=options.per_row)
    table: dict[str, Slot] = {}
    inputs: dict[str, dict[str, ir.Value]] = {}
    unslotted: dict[str, str] = {}
    reasons: list[str] = []
    chosen: list[tuple[ir.Node, Slot, Columns]] = []
    left: list[Site] = []
    seen: set[str] = set()

    def choose(site: Site, slot: Slot, columns: Columns) -> None:
        paths = [member.module_path for member in slot.members]
        excluded = {path: reason for path in paths if (reason := exclude(path))}
        unslotted.update(excluded)
        if excluded:
            return
        chosen.append((site.node, slot, columns))
        # What is called twice takes an adapter in both places or in none, and so a gain.
        if (reason := controls.why_not(slot, site)) is not None:
            unslotted.update(dict.fromkeys(paths, reason))
        elif "gain" in options.variants and site.bias_is_fixed:
            unslotted.update(dict.fromkeys(map(slot_gain, paths), _FIXED_BIAS))

    for node in list(model.graph.all_nodes()):
        site = find_site(node)
        if site is None or not options.serves(site.kind):
            continue
        matched = matcher.match(site)
        if isinstance(matched, Unmatched):
            reasons.append(f"{node.name or node.op_type}: {matched.reason}")
            left.append(site)
            continue
        seen.update(module.path for module in matched)
        choose(site, _slot(site, matched, options), Columns((site.out_features,)))
    for split in matcher.split(left, seen):
        slot = _slot(split.sites[0], (split.module,), options)
        widths = tuple(site.out_features for site in split.sites)
        for number, site in enumerate(split.sites):
            choose(site, slot, Columns(widths, number))
    if not options.per_row:
        flatten_rows(model.graph, [node for node, _, _ in chosen])
    parts = SlotParts(model.graph)
    for node, slot, columns in chosen:
        paths = [member.module_path for member in slot.members]
        if any(path in unslotted for path in paths):
            continue
        if any(slot_gain(path) in unslotted for path in paths):
            slot = replace(slot, gain=False)
        site = find_site(node)  # anew: its values may be rows now
        assert site is not None
        if slot.name not in table:
            for entry in slot.inputs.values():
                require_free(entry.name, model.graph, outside)
            inputs[slot.name] = _add_inputs(model.graph, slot, site, lanes=options.per_row)
            table[slot.name] = slot
        if slot != table[slot.name]:
            raise LoraportError(
                f"{slot.name}: expected the same operator wherever the module is called, got "
                f"{table[slot.name]} and {slot}"
            )
        site = site.exposed()
        record_slot(site.node, slot.name, columns.first)
        part, values = parts.of(slot, inputs[slot.name], columns)
        add_slot_nodes(model.graph, part, site, values, controls)
    if not table:
        reasons += [f"{path}: {reason}" for path, reason in unslotted.items()]
        raise LoraportError(
            "slots: expected operators that can have one, got none"
            + "".join(f"\n  - {reason}" for reason in reasons[:20])
        )
    covered = {member.module_path for slot in table.values() for member in slot.members}
    for path in wanted:
        if path not in covered:
            unslotted.setdefault(path, "no operator of the graph computes it by itself")
    store_integer_constants(model.graph)
    model.ir_version = max(model.ir_version or 0, _MINIMUM_IR_VERSION)
    slots = SlotTable(tuple(table.values()), controls=tuple(controls.made))
    added = {*slots.inputs(), *(control.input for control in slots.controls)}
    rename_inner(model.graph, added)
    return SlottedModel(model, slots, unslotted)


def with_replacements(
    slotted: SlottedModel, options: SlotOptions, holders: Holders
) -> SlottedModel:
    """Make parameters replaceable as a whole, where the options say so.

    Args:
        slotted: The graph, changed in place.
        options: What the slots can take.
        holders: Finds parameters in the graph.

    Raises:
        LoraportError: If a name of the options means nothing that can be replaced.
    """
    if not options.replace:
        return slotted
    modules = slotted.slots.modules()
    biases = {bias_name(path): slot.bias for path, (slot, _) in modules.items()}
    made = make_replaceable(slotted.model.graph, options.replace, holders, biases)
    return SlottedModel(
        slotted.model,
        replace(slotted.slots, replacements=made.slots),
        {**slotted.unslotted, **made.refused},
        made.base_values,
    )


def require_slot_inputs(model: ir.Model, slots: SlotTable) -> None:
    """Turn the slots' and controls' overridable initializers into required inputs, in place."""
    for name in (*slots.inputs(), *(control.input for control in slots.controls)):
        model.graph.initializers.pop(name)


def _slot(site: Site, modules: Match, options: SlotOptions) -> Slot:
    members = []
    start = 0
    for module in modules:
        members.append(SlotMember(module.path, start, start + module.out_features))
        start += module.out_features
    return Slot(
        name=packed_slot(tuple(module.path for module in modules)),
        in_features=site.in_features,
        out_features=start,
        dtype=site.dtype.name,
        members=tuple(members),
        kind=site.kind,
        kernel=site.kernel,
        gain="gain" in options.variants,
        bias="bias" in options.variants,
    )


def _add_inputs(graph: ir.Graph, slot: Slot, site: Site, *, lanes: bool) -> dict[str, ir.Value]:
    found = {}
    for role, entry in slot.inputs.items():
        value = _overridable(graph, entry, site.dtype)
        if lanes and slot.kind is ModuleKind.LINEAR:  # as long as there are lanes
            value.shape = ir.Shape(entry.lanes_shape)
        found[role] = value
    return found


def _overridable(graph: ir.Graph, entry: SlotInput, dtype: ir.DataType) -> ir.Value:
    """Add a graph input with a default that changes nothing."""
    value = ir.Value(name=entry.name, shape=ir.Shape(entry.shape), type=ir.TensorType(dtype))
    default = np.full(entry.neutral_shape, entry.neutral, dtype.numpy())
    value.const_value = ir.tensor(default, name=entry.name)
    graph.inputs.append(value)
    graph.register_initializer(value)
    return value
