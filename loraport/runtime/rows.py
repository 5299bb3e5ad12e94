"""Different adapters in the rows of one batch: all of them resident, one picked per row."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from loraport.adapter import ModuleKind
from loraport.bundle.slots import (
    ADAPTER_IDS_INPUT,
    BASE,
    Control,
    ControlRole,
    Slot,
    SlotTable,
)
from loraport.counts import counted
from loraport.errors import LoraportError

if TYPE_CHECKING:
    from loraport.runtime.lane import Lane

_DTYPES: dict[str, Any] = {
    "FLOAT": np.float32,
    "FLOAT16": np.float16,
    "BFLOAT16": ml_dtypes.bfloat16,
    "DOUBLE": np.float64,
}


def stack_packed(
    lanes: Sequence[Mapping[str, np.ndarray]], table: SlotTable
) -> dict[str, np.ndarray]:
    """Lay several packed adapters together, as `ControlRole` says.

    Args:
        lanes: Packed tensors of each lane.
        table: The slot table.

    Returns:
        Graph input → tensor: the slots', and int64 ``lora_lanes.K`` ``[r]``.

    Raises:
        LoraportError: If the bundle was exported without ``--per-row``.
    """
    if not table.per_row:
        raise LoraportError(
            "adapters per row: expected a bundle with adapter_ids, got one without; export it "
            "again with --per-row"
        )
    if not lanes:
        return {}  # the graph's defaults: one lane that adds nothing
    stacked: dict[str, np.ndarray] = {}
    for slot in table.slots:
        if slot.kind is ModuleKind.LINEAR:
            stacked |= _one_after_the_other(lanes, slot)
    others = [slot for slot in table.slots if slot.kind is not ModuleKind.LINEAR]
    return stacked | _side_by_side(lanes, others, table.controls)


def _one_after_the_other(
    lanes: Sequence[Mapping[str, np.ndarray]], slot: Slot
) -> dict[str, np.ndarray]:
    """Return ``A`` ``[lanes * in, r]`` and ``B`` ``[lanes * r, out]`` with the largest rank.

    A slot that no lane fills has as many lanes, too: the graph counts them once for all.
    """
    found = [tensors.get(slot.input_a) for tensors in lanes]
    ranks = [a.shape[1] if a is not None else 0 for a in found]
    rank = max([1, *ranks])
    dtype = next((a.dtype for a in found if a is not None), _DTYPES[slot.dtype])
    a = np.zeros((len(lanes), slot.in_features, rank), dtype)
    b = np.zeros((len(lanes), rank, slot.out_features), dtype)
    for number, (tensors, own) in enumerate(zip(lanes, ranks, strict=True)):
        if own:
            a[number, :, :own] = tensors[slot.input_a]
            b[number, :own] = tensors[slot.input_b]
    return {slot.input_a: a.reshape(-1, rank), slot.input_b: b.reshape(-1, slot.out_features)}


def _side_by_side(
    lanes: Sequence[Mapping[str, np.ndarray]],
    slots: Sequence[Slot],
    controls: Sequence[Control],
) -> dict[str, np.ndarray]:
    """Return the columns of all lanes, and whose each is.

    Slots of as many modules share one input that says it, so within them a lane has the same
    columns everywhere: its largest rank, filled up with zeros.
    """
    empty: list[int] = [0] * len(lanes)
    ranks: dict[int, list[int]] = defaultdict(empty.copy)
    for slot in slots:
        axis = slot.inputs["lora_A"].rank_axis or 0
        widest = ranks[len(slot.members)]
        for number, tensors in enumerate(lanes):
            if slot.input_a in tensors:
                widest[number] = max(widest[number], tensors[slot.input_a].shape[axis])
    stacked: dict[str, np.ndarray] = {}
    for slot in slots:
        widest = ranks[len(slot.members)]
        if not any(widest):
            continue
        # Also where no lane fills it: the graph counts the columns once for all.
        for entry in (slot.inputs["lora_A"], slot.inputs["lora_B"]):
            given = [tensors[entry.name].dtype for tensors in lanes if entry.name in tensors]
            dtype = given[0] if given else _DTYPES[slot.dtype]
            axis = entry.rank_axis or 0
            shape = [sum(widest) if isinstance(n, str) else n for n in entry.shape]
            whole = np.zeros(shape, dtype)
            columns = np.moveaxis(whole, axis, 0)  # a view
            start = 0
            for tensors, width in zip(lanes, widest, strict=True):
                if entry.name in tensors:
                    part = np.moveaxis(tensors[entry.name], axis, 0)
                    columns[start : start + len(part)] = part
                start += width
            stacked[entry.name] = whole
    for control in controls:
        widest = ranks.get(control.members, [])
        if control.role is ControlRole.LANES and any(widest):
            numbers = [lane for lane, width in enumerate(widest) for _ in range(width)]
            stacked[control.input] = np.array(numbers, np.int64)
    return stacked


class Rows:
    """A lane whose batches have an adapter of its own in every row; made by `Runtime.rows`.

    Args:
        lane: A lane with the stacked adapters bound.
        names: What the lanes of the stack are called, in their order.
    """

    def __init__(self, lane: Lane, names: Sequence[str]) -> None:
        self._lane = lane
        self._numbers = {name: number for number, name in enumerate(names)}

    def run(
        self,
        inputs: Mapping[str, Any],
        adapters: Sequence[str | None],
        outputs: Iterable[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Run a batch.

        Args:
            inputs: Every input of the model; the first dimension is the batch.
            adapters: Per row the name of an adapter of this stack, or ``None`` for the base.
            outputs: Names of the outputs wanted; all unless told.

        Raises:
            LoraportError: If a name is unknown, or the rows are as many as no input's.
        """
        return self._lane.run(self.with_ids(inputs, adapters), outputs)

    def with_ids(self, inputs: Mapping[str, Any], adapters: Sequence[str | None]) -> dict[str, Any]:
        """Return the inputs with ``adapter_ids`` ``[batch]`` among them."""
        if isinstance(adapters, str):
            raise LoraportError(f"adapters per row: expected a name per row, got {adapters!r}")
        unknown = [name for name in adapters if name is not None and name not in self._numbers]
        if unknown:
            raise LoraportError(
                f"adapters per row: expected of {', '.join(self._numbers) or 'none'}, got "
                f"{', '.join(unknown)}; name them when making the rows"
            )
        arrays = [value for value in inputs.values() if isinstance(value, np.ndarray)]
        batches = {array.shape[0] for array in arrays if array.ndim}
        if batches and len(adapters) not in batches:
            raise LoraportError(
                f"adapters per row: expected one for each of {counted(max(batches), 'row')}, got "
                f"{len(adapters)}"
            )
        ids = [BASE if name is None else self._numbers[name] for name in adapters]
        return {**inputs, ADAPTER_IDS_INPUT: np.array(ids, np.int64)}
