"""Find the slot of everything in an adapter; what has none is named, all of it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Protocol

import onnx_ir as ir
import torch

from converters.onnx.graph.torch_dtypes import TORCH_DTYPES
from converters.onnx.packing.token_rows import rows_misfit, token_update
from converters.onnx.slots.slot_tensors import require_finite
from loraport.adapter import Adapter, LoraModule, ModuleKind, Replacement
from loraport.bundle.slots import Slot, SlotMember, SlotTable
from loraport.errors import LoraportError, Problems, first_names
from loraport.naming import slot_gain, weight_name
from loraport.update import LowRankUpdate, weighted_sum
from loraport.variants import lower

MERGE = "merge the adapter and export that"
_NUMBER = re.compile(r"\d+")


class Base(Protocol):
    """What is known of the base's weights; see `base_parameters`."""

    def weight(self, path: str, in_out: bool = False) -> torch.Tensor:
        """Return a module's weight as it is stored."""
        ...

    def rounded(self, path: str) -> torch.Tensor | None:
        """Return a module's weight as the graph has it, if that is rounded."""
        ...

    def is_rounded(self, path: str) -> bool:
        """Tell whether the graph has a module's weight rounded, with a slot or without."""
        ...

    def bias(self, path: str) -> torch.Tensor:
        """Return a module's bias."""
        ...

    def is_copy(self, parameter: str, tensor: torch.Tensor) -> bool:
        """Tell whether a parameter that an adapter stores is the base's own."""
        ...


@dataclass(frozen=True, eq=False)
class Fitted:
    """An adapter by its slots.

    Attributes:
        updates: Module path → what its slot takes.
        scalings: Module path → LoRA scaling, for those that have one.
        whole: Graph input → the parameter that it takes.
    """

    updates: dict[str, LowRankUpdate] = field(default_factory=dict)
    scalings: dict[str, float] = field(default_factory=dict)
    whole: dict[str, torch.Tensor] = field(default_factory=dict)


def fit(
    adapter: Adapter,
    table: SlotTable,
    unslotted: Mapping[str, str],
    base: Base | None,
    problems: Problems,
) -> Fitted:
    """Return everything in the adapter with its place.

    Args:
        adapter: The adapter.
        table: The slots.
        unslotted: Module or parameter path → why the export gave it no slot.
        base: The base's weights, for variants that depend on them.
        problems: Where everything that has no slot or does not fit is noted.
    """
    fitter = _Fitter(adapter, table, unslotted, base, problems)
    whole = {
        name: found
        for name, found in adapter.replacements.items()
        if found.rows is not None or base is None or not base.is_copy(name, found.tensor)
    }
    for path, module in adapter.modules.items():
        fitter.add_module(path, module, whole.get(weight_name(path)))
    for parameter, replacement in whole.items():
        if replacement.rows is None:
            fitter.add_parameter(parameter, replacement.tensor)
        else:
            fitter.add_rows(parameter.removesuffix(".weight"), replacement)
    return fitter.fitted


class _Fitter:
    def __init__(
        self,
        adapter: Adapter,
        table: SlotTable,
        unslotted: Mapping[str, str],
        base: Base | None,
        problems: Problems,
    ) -> None:
        self._table = table
        self._places = table.modules()
        self._unnamed = [
            slot
            for slot in table.slots
            if not any(member.module_path in adapter.modules for member in slot.members)
        ]
        self._unslotted = unslotted
        self._base = base
        self._problems = problems
        self.fitted = Fitted()

    def add_module(self, path: str, module: LoraModule, own_weight: Replacement | None) -> None:
        """Lower a module for its slot."""
        place = self._place(path, module.kind, module)
        if place is None:
            return
        slot, member = place
        add = self._problems.add
        if module.kind is not slot.kind:
            add(path, f"an update of a {slot.kind.value} module", module.kind.value)
            return
        expected = (slot.in_features, *slot.kernel, member.stop - member.start)
        if (got := (*module.lora_A.shape[1:], module.lora_B.shape[0])) != expected:
            add(path, f"in and out features {expected}", f"{tuple(got)}")
            return
        weight = None
        if module.magnitude is not None:
            if not slot.gain:
                reason = self._unslotted.get(slot_gain(path))
                remedy = f"{reason}; {MERGE}" if reason else export_with("gain")
                add(path, "a slot with a gain", "DoRA", remedy)
                return
            weight = self._base_weight(path, module, own_weight)
            if weight is None:
                return
        try:
            update = lower(module, weight)
        except LoraportError as error:
            add(path, "an update that the slot can take", str(error))
            return
        if update.bias is not None and not slot.bias:
            add(path, "a slot with a bias", "lora_bias", export_with("bias"))
        self.fitted.updates[path] = update
        self.fitted.scalings[path] = module.scaling

    def add_parameter(self, parameter: str, tensor: torch.Tensor) -> None:
        """Give a whole parameter to its slot."""
        slot = next((s for s in self._table.replacements if s.parameter == parameter), None)
        if slot is None and self._add_bias(parameter, tensor):
            return
        if slot is None:
            name = parameter.rpartition(".")[0] or parameter
            known = [each.parameter for each in self._table.replacements]
            remedy = (
                self._unslotted.get(parameter)
                or _named_otherwise(parameter, known)
                or self._why_rounded(parameter)
                or f"export again with --replace {name}, or {MERGE}"
            )
            got = "none, and the adapter stores it as a whole (modules_to_save or a trained bias)"
            self._problems.add(parameter, "a slot for this parameter", got, remedy)
            return
        value = tensor.T if slot.transposed else tensor
        if tuple(value.shape) != slot.shape:
            expected = slot.shape[::-1] if slot.transposed else slot.shape
            self._problems.add(parameter, f"{list(expected)}", f"{list(tensor.shape)}")
            return
        value = value.to(TORCH_DTYPES[ir.DataType[slot.dtype].name]).contiguous()
        require_finite(slot.dtype, {slot.input: value}, self._problems)
        self.fitted.whole[slot.input] = value

    def _why_rounded(self, parameter: str) -> str | None:
        """Return what is to be done where no export of this precision takes a parameter anew."""
        path = parameter.removesuffix(".weight")
        if path == parameter or self._base is None or not self._base.is_rounded(path):
            return None
        return (
            f"the graph holds its weight rounded, for which nothing whole can stand; {MERGE}, or "
            f"export again in a precision that does not round, with --replace {path}"
        )

    def _add_bias(self, parameter: str, tensor: torch.Tensor) -> bool:
        """Let a slot's bias input make a module's bias the trained one; tell if there is one."""
        path = parameter.removesuffix(".bias")
        if path == parameter or path not in self._places or not self._places[path][0].bias:
            return False
        slot, member = self._places[path]
        try:
            own = self._base.bias(path) if self._base is not None else None
        except LoraportError as error:
            self._problems.add(parameter, "the base's bias, to tell the change from", str(error))
            return True
        if own is None or own.shape != tensor.shape:
            return False
        moved = tensor.float() - own.float()
        update = self.fitted.updates.get(path)
        if update is None:
            width = member.stop - member.start
            columns = slot.in_features * math.prod(slot.kernel)
            nothing = LowRankUpdate(torch.zeros(1, columns), torch.zeros(width, 1), scaling=1.0)
            update = nothing
        if update.bias is not None:
            moved = moved + update.bias
        self.fitted.updates[path] = replace(update, bias=moved)
        return True

    def add_rows(self, path: str, replacement: Replacement) -> None:
        """Give trained tokens to the slot of the embedding, and of a head tied to it."""
        placed = self._place(path, ModuleKind.EMBEDDING)
        if placed is None:
            return
        try:
            base = self._rounded(path)
            if base is None and self._base is not None:
                base = self._base.weight(path)
        except LoraportError as error:
            self._problems.add(path, "the base's rows of the trained tokens", str(error))
            return
        if base is None:
            self._problems.add(path, "the base, which trained tokens depend on", "none", MERGE)
            return
        if (wanted := rows_misfit(replacement, base)) is not None:
            got = f"{list(replacement.tensor.shape)} for tokens {list(replacement.rows or ())[:8]}"
            self._problems.add(path, wanted, got)
            return
        # Rows of a head are its own: a tie leads from the embedding to the head only.
        tied = self._table.tied_to(path) if placed[0].kind == ModuleKind.EMBEDDING else ()
        for module in (path, *tied):
            if module not in self._places:
                reason = self._unslotted.get(module, "export again with --lm-head")
                expected = "a slot, as it shares the weight whose tokens were trained"
                self._problems.add(module, expected, "none", f"{reason}; or {MERGE}")
                continue
            slot, _ = self._places[module]
            # A head may be rounded where the embedding is not that it shares its weight with.
            rounded = self._rounded(module)
            weight = base if rounded is None else rounded
            self._combine(module, token_update(replacement, weight, slot.kind))

    def _rounded(self, path: str) -> torch.Tensor | None:
        return self._base.rounded(path) if self._base is not None else None

    def _combine(self, path: str, update: LowRankUpdate) -> None:
        known = self.fitted.updates.get(path)
        if known is not None and known.gain is not None:
            self._problems.add(path, "trained tokens or DoRA", "both", MERGE)
            return
        whole = update if known is None else weighted_sum([(known, 1.0), (update, 1.0)])
        self.fitted.updates[path] = whole

    def _place(
        self, path: str, kind: ModuleKind, module: LoraModule | None = None
    ) -> tuple[Slot, SlotMember] | None:
        if path in self._places:
            return self._places[path]
        reason = self._unslotted.get(path) or self._why_unknown(path, kind, module)
        self._problems.add(path, "a slot for this module", "none", reason)
        return None

    def _why_unknown(self, path: str, kind: ModuleKind, module: LoraModule | None) -> str:
        """Return why a module that the export says nothing of has no slot."""
        if kind is ModuleKind.EXPERTS:
            return f"the experts of a mixture have no slots; {MERGE}"
        if (otherwise := _named_otherwise(path, self._places)) is not None:
            return otherwise
        operator = _OPERATORS.get(kind)
        if operator is None or any(slot.kind is kind for slot in self._table.slots):
            return f"the exported model has no such module{self._alike(path, module)}"
        left = [f"{k} ({v})" for k, v in self._unslotted.items() if v.startswith(operator)]
        if left:
            return f"the exported model has none by this name, and no slot beside {', '.join(left)}"
        return export_with(kind.value)

    def _alike(self, path: str, module: LoraModule | None) -> str:
        """Return what helps where slots that the adapter does not name have a module's shape."""
        if module is None:
            return ""
        inside, outside = tuple(module.lora_A.shape[1:]), module.lora_B.shape[0]
        reading = [
            slot
            for slot in self._unnamed
            if slot.kind is module.kind and (slot.in_features, *slot.kernel) == inside
        ]
        alike = [slot.name for slot in reading if slot.out_features >= outside]
        if not alike:
            numbers = _NUMBER.findall(path)
            layer = [slot for slot in reading if _NUMBER.findall(slot.name) == numbers]
            parent = path.rpartition(".")[0]
            beside = [slot for slot in layer if slot.name.rpartition(".")[0] == parent]
            adding_up = _adding_up_to(outside, beside) or _adding_up_to(outside, layer)
            parts = " and ".join(slot.name for slot in adding_up)
            if parts:
                return (
                    f", but {parts} with as many outputs; if they are it, export again with "
                    "--base, which tells that"
                )
            return ""
        return (
            f" by this name, and the adapter none for {first_names(alike, 1)}, which would take "
            "it; where a tool lost the names, export again with --base, which tells them"
        )

    def _base_weight(
        self, path: str, module: LoraModule, own: Replacement | None
    ) -> torch.Tensor | None:
        if own is not None and own.rows is None:
            return own.tensor
        if self._base is None:
            self._problems.add(path, "the base, which DoRA's gain depends on", "none", MERGE)
            return None
        try:
            return self._base.weight(path, module.fan_in_fan_out)
        except LoraportError as error:
            self._problems.add(path, "the base's weight, which DoRA's gain depends on", str(error))
            return None


# What computes the kinds that have slots only where they are asked for.
_OPERATORS = {ModuleKind.EMBEDDING: "Gather", ModuleKind.CONV: "Conv"}


def _adding_up_to(width: int, slots: Sequence[Slot]) -> Sequence[Slot]:
    """Return the first slots one after the other that have so many outputs together, if any do."""
    for start in range(len(slots)):
        widths = accumulate(slot.out_features for slot in slots[start:])
        for stop, sum_of_widths in enumerate(widths, start + 1):
            if sum_of_widths == width:
                return slots[start:stop]
    return ()


def _named_otherwise(path: str, known: Iterable[str]) -> str | None:
    """Return what is to be done where a slot has the name that a wrapper around the base gave."""
    alike = [k for k in known if k.endswith(f".{path}") or path.endswith(f".{k}")]
    if len(alike) != 1:
        return None
    return f"the exported model calls it {alike[0]}; export again with --base, whose names count"


def export_with(variant: str) -> str:
    """Return the remedy for an adapter with a variant that the slots were not made for."""
    return f"export again with {variant} among --slots, or {MERGE}"
