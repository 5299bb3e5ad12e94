"""The slot table: which graph inputs take which modules' updates."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Any

import numpy as np

from loraport.adapter import ModuleKind
from loraport.naming import slot_a, slot_b, slot_bias, slot_gain

STRENGTH_INPUT = "lora_strength"
ADAPTER_IDS_INPUT = "adapter_ids"
BASE = -1  # the adapter id of a row without adapter
_MOST = 2**31 - 1  # of one dimension


def _size(value: Any) -> int:
    """Return a dimension of a manifest, or raise ValueError where no tensor has such."""
    if type(value) is not int or not 1 <= value <= _MOST:  # type(), as True is an int
        raise ValueError(f"a dimension that is {value!r}")
    return value


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
class SlotInput:
    """A graph input that an adapter fills.

    Attributes:
        name: The input's name.
        shape: Its dimensions; the one that is a text is the slot's rank.
        neutral: What fills the input where there is no adapter.
    """

    name: str
    shape: tuple[int | str, ...]
    neutral: float

    @property
    def neutral_shape(self) -> tuple[int, ...]:
        """Shape of the input's default: rank 1, since WebGPU breaks on empty tensors."""
        return tuple(1 if isinstance(size, str) else size for size in self.shape)

    @property
    def lanes_shape(self) -> tuple[int | str, ...]:
        """Shape of a linear module's input that takes adapters one after the other."""
        return (f"{self.name}.lanes", *self.shape[1:])

    @property
    def rank_axis(self) -> int | None:
        """The dimension that is the rank; ``None`` if there is none."""
        return next((i for i, size in enumerate(self.shape) if isinstance(size, str)), None)

    def fits(self, shape: tuple[int, ...]) -> bool:
        """Tell whether a tensor of this shape can fill the input, whatever its rank."""
        return len(shape) == len(self.shape) and all(
            got >= 1 if isinstance(size, str) else got == size
            for got, size in zip(shape, self.shape, strict=True)
        )


@dataclass(frozen=True)
class Slot:
    """A place in the graph where an update is added to an operator's output.

    ``y' = gain * y + (x A) B + bias``, where ``y`` is without the operator's own bias if there is
    a gain. A convolution's ``x A`` is a convolution with the kernel ``A``, its ``B`` one with a
    1×1 kernel; an embedding's ``x A`` are rows of ``A``.

    Attributes:
        name: Module path, or several joined for a packed operator.
        in_features: Features of ``x``: channels of a convolution, vocabulary of an embedding.
        out_features: Features of ``y``.
        dtype: ONNX name of the inputs' element type, e.g. ``"FLOAT"``.
        members: Modules in the order of their columns; they cover all of them.
        kind: Decides the shapes of ``A`` and ``B``.
        kernel: A convolution's kernel size.
        gain: It has an input ``gain`` ``[out]``, ones by default.
        bias: It has an input ``bias`` ``[out]``, zeros by default.
    """

    name: str
    in_features: int
    out_features: int
    dtype: str
    members: tuple[SlotMember, ...]
    kind: ModuleKind = ModuleKind.LINEAR
    kernel: tuple[int, ...] = ()
    gain: bool = False
    bias: bool = False

    @property
    def input_a(self) -> str:
        """Graph input that takes ``A`` ``[in, r]``; of a convolution ``[r, in, *kernel]``."""
        return slot_a(self.name)

    @property
    def input_b(self) -> str:
        """Graph input that takes ``B``, scaling folded in.

        ``[r, out]``; of a convolution ``[out, r, 1, ...]``.
        """
        return slot_b(self.name)

    @property
    def input_gain(self) -> str:
        """Graph input that takes the gain ``[out]``, if there is one."""
        return slot_gain(self.name)

    @property
    def input_bias(self) -> str:
        """Graph input that takes the bias ``[out]``, if there is one."""
        return slot_bias(self.name)

    @cached_property
    def inputs(self) -> Mapping[str, SlotInput]:
        """Role (``lora_A``, ``lora_B``, ``gain``, ``bias``) → the input that has it."""
        rank = f"{self.name}.rank"
        shape_a: tuple[int | str, ...] = (self.in_features, rank)
        shape_b: tuple[int | str, ...] = (rank, self.out_features)
        if self.kind is ModuleKind.CONV:
            shape_a = (rank, self.in_features, *self.kernel)
            shape_b = (self.out_features, rank, *(1 for _ in self.kernel))
        found = {
            "lora_A": SlotInput(self.input_a, shape_a, 0.0),
            "lora_B": SlotInput(self.input_b, shape_b, 0.0),
        }
        if self.gain:
            found["gain"] = SlotInput(self.input_gain, (self.out_features,), 1.0)
        if self.bias:
            found["bias"] = SlotInput(self.input_bias, (self.out_features,), 0.0)
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the slot's entry of the manifest."""
        entry: dict[str, Any] = {
            "name": self.name,
            "kind": self.kind.value,
            "inputs": {role: value.name for role, value in self.inputs.items()},
            "in_features": self.in_features,
            "out_features": self.out_features,
            "dtype": self.dtype,
            "modules": [
                {"path": member.module_path, "start": member.start, "stop": member.stop}
                for member in self.members
            ],
        }
        if self.kernel:
            entry["kernel"] = list(self.kernel)
        return entry

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Slot:
        """Read an entry; anything malformed raises TypeError, ValueError or KeyError."""
        modules = entry["modules"]
        if not isinstance(modules, list):
            raise TypeError("a slot's modules are not a list")
        return cls(
            name=str(entry["name"]),
            in_features=_size(entry["in_features"]),
            out_features=_size(entry["out_features"]),
            dtype=str(entry["dtype"]),
            members=tuple(
                SlotMember(str(member["path"]), int(member["start"]), int(member["stop"]))
                for member in modules
            ),
            kind=ModuleKind(entry.get("kind", ModuleKind.LINEAR)),
            kernel=tuple(_size(size) for size in entry.get("kernel", ())),
            gain="gain" in entry["inputs"],
            bias="bias" in entry["inputs"],
        )


@dataclass(frozen=True)
class ReplacementSlot:
    """A graph input that takes a whole parameter; the base's own by default.

    Attributes:
        parameter: The parameter's path in the PyTorch model.
        input: The graph input.
        shape: The input's shape.
        dtype: ONNX name of its element type.
        transposed: The graph holds the parameter's transpose.
    """

    parameter: str
    input: str
    shape: tuple[int, ...]
    dtype: str
    transposed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the manifest."""
        return {**vars(self), "shape": list(self.shape)}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> ReplacementSlot:
        """Read an entry; anything malformed raises TypeError, ValueError or KeyError."""
        return cls(
            parameter=str(entry["parameter"]),
            input=str(entry["input"]),
            shape=tuple(_size(size) for size in entry["shape"]),
            dtype=str(entry["dtype"]),
            transposed=bool(entry["transposed"]),
        )


class ControlRole(StrEnum):
    """What an input says that belongs to no slot.

    - ``strength``: FLOAT ``[1]``, or one per lane ``[lanes]``; the factor on updates, 1 by default.
    - ``adapter_ids``: INT64 ``[batch]``; the lane of each row, -1 for the base; 0 by default.
    - ``lanes``: INT64 ``[r]``; the lane that each column of ``A`` belongs to, in the slots of
      embeddings and convolutions with as many members as the control says; 0 by default.

    With ``adapter_ids``, slots of linear modules take whole adapters one after the other: ``A``
    ``[lanes * in, r]`` and ``B`` ``[lanes * r, out]``, all with as many lanes.
    """

    STRENGTH = "strength"
    ADAPTER_IDS = "adapter_ids"
    LANES = "lanes"


@dataclass(frozen=True)
class Control:
    """A graph input that says how adapters are used in a run.

    Attributes:
        input: The graph input; its default ``[1]`` means: one adapter in all rows, at strength 1.
        role: What it says.
        members: For ``lanes``, of which slots: those with this many modules.
    """

    input: str
    role: ControlRole
    members: int = 0

    @property
    def dtype(self) -> str:
        """ONNX name of the input's element type."""
        return "FLOAT" if self.role is ControlRole.STRENGTH else "INT64"

    @property
    def neutral(self) -> int:
        """The default's only element."""
        return 1 if self.role is ControlRole.STRENGTH else 0

    def default(self) -> np.ndarray:
        """Return the default ``[1]``."""
        return np.full(1, self.neutral, np.float32 if self.dtype == "FLOAT" else np.int64)

    def to_json(self) -> dict[str, Any]:
        """Return the entry of the manifest."""
        entry = {"input": self.input, "role": self.role.value, "dtype": self.dtype}
        return {**entry, "neutral": self.neutral, "members": self.members}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Control:
        """Read an entry; anything malformed raises TypeError, ValueError or KeyError."""
        return cls(str(entry["input"]), ControlRole(entry["role"]), int(entry["members"]))


@dataclass(frozen=True)
class SlotTable:
    """All slots of an exported model.

    Attributes:
        slots: Places where updates are added.
        replacements: Parameters that can be replaced as a whole.
        controls: Inputs that say how adapters are used in a run.
        tied: Groups of modules that share one weight in the base.
    """

    slots: tuple[Slot, ...]
    replacements: tuple[ReplacementSlot, ...] = ()
    controls: tuple[Control, ...] = ()
    tied: tuple[tuple[str, ...], ...] = ()

    def tied_to(self, path: str) -> tuple[str, ...]:
        """Return the other modules that share a module's weight."""
        group = next((group for group in self.tied if path in group), ())
        return tuple(other for other in group if other != path)

    @property
    def per_row(self) -> bool:
        """Every row of a batch can have its own adapter."""
        return any(control.role is ControlRole.ADAPTER_IDS for control in self.controls)

    @property
    def strength(self) -> bool:
        """There is an input that scales every update."""
        return any(control.role is ControlRole.STRENGTH for control in self.controls)

    def inputs(self) -> list[str]:
        """Return the names of all graph inputs that adapters fill."""
        names = [value.name for slot in self.slots for value in slot.inputs.values()]
        return names + [slot.input for slot in self.replacements]

    def low_rank_inputs(self) -> Iterator[tuple[Slot, str, SlotInput]]:
        """Yield slot, role and input of everything but whole parameters."""
        for slot in self.slots:
            for role, value in slot.inputs.items():
                yield slot, role, value

    def graph_shape(self, slot: Slot, entry: SlotInput) -> tuple[int | str, ...]:
        """Return the shape that the graph gives an input of a slot."""
        in_lanes = self.per_row and slot.kind is ModuleKind.LINEAR
        return entry.lanes_shape if in_lanes else entry.shape

    def modules(self) -> dict[str, tuple[Slot, SlotMember]]:
        """Return module path → its slot and its part of it."""
        return {
            member.module_path: (slot, member) for slot in self.slots for member in slot.members
        }

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's ``slots``, ``replacements``, ``controls`` and ``tied``."""
        document: dict[str, Any] = {"slots": [slot.to_json() for slot in self.slots]}
        if self.replacements:
            document["replacements"] = [slot.to_json() for slot in self.replacements]
        if self.controls:
            document["controls"] = [control.to_json() for control in self.controls]
        if self.tied:
            document["tied"] = [list(group) for group in self.tied]
        return document

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> SlotTable:
        """Read the manifest; anything malformed raises TypeError, ValueError or KeyError."""
        return cls(
            slots=tuple(Slot.from_json(entry) for entry in document["slots"]),
            replacements=tuple(
                ReplacementSlot.from_json(entry) for entry in document.get("replacements", ())
            ),
            controls=tuple(Control.from_json(entry) for entry in document.get("controls", ())),
            tied=tuple(tuple(map(str, group)) for group in document.get("tied", ())),
        )
