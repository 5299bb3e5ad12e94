"""The slot table: which graph inputs take which modules' updates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from loraport.naming import slot_a, slot_b


@dataclass(frozen=True)
class SlotMember:
    """One module served by a slot, and the slot's output columns that are its own.

    Attributes:
        module_path: The module in the PyTorch model.
        start: First output column.
        stop: One past the last.
    """

    module_path: str
    start: int
    stop: int


@dataclass(frozen=True)
class Slot:
    """A place in the graph where a low-rank update is added: ``y += (x A) B``.

    Attributes:
        name: Module path, or several joined for a packed operator.
        in_features: Rows of ``A``.
        out_features: Columns of ``B``.
        dtype: ONNX name of both inputs' element type, e.g. ``"FLOAT"``.
        members: Modules in the order of their columns; they cover all of them.
    """

    name: str
    in_features: int
    out_features: int
    dtype: str
    members: tuple[SlotMember, ...]

    @property
    def input_a(self) -> str:
        """Graph input that takes ``A`` ``[in, r]``."""
        return slot_a(self.name)

    @property
    def input_b(self) -> str:
        """Graph input that takes ``B`` ``[r, out]``, scaling folded in."""
        return slot_b(self.name)


@dataclass(frozen=True)
class SlotTable:
    """All slots of an exported model."""

    slots: tuple[Slot, ...]

    def inputs(self) -> list[str]:
        """Return the names of all graph inputs that slots own."""
        return [name for slot in self.slots for name in (slot.input_a, slot.input_b)]

    def modules(self) -> dict[str, tuple[Slot, SlotMember]]:
        """Return module path → its slot and its part of it."""
        return {
            member.module_path: (slot, member) for slot in self.slots for member in slot.members
        }

    def to_json(self) -> list[dict[str, object]]:
        """Return the manifest's ``slots``."""
        return [
            {
                "name": slot.name,
                "inputs": {"lora_A": slot.input_a, "lora_B": slot.input_b},
                "in_features": slot.in_features,
                "out_features": slot.out_features,
                "dtype": slot.dtype,
                "modules": [
                    {"path": member.module_path, "start": member.start, "stop": member.stop}
                    for member in slot.members
                ],
            }
            for slot in self.slots
        ]

    @classmethod
    def from_json(cls, entries: Iterable[Mapping[str, object]]) -> SlotTable:
        """Read the manifest's ``slots``; anything malformed raises TypeError or KeyError."""
        return cls(tuple(_slot(entry) for entry in entries))


def _slot(entry: Mapping[str, object]) -> Slot:
    modules = entry["modules"]
    if not isinstance(modules, list):
        raise TypeError("a slot's modules are not a list")
    members = tuple(
        SlotMember(str(member["path"]), int(member["start"]), int(member["stop"]))
        for member in modules
    )
    return Slot(
        name=str(entry["name"]),
        in_features=int(str(entry["in_features"])),
        out_features=int(str(entry["out_features"])),
        dtype=str(entry["dtype"]),
        members=members,
    )
