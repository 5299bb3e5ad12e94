"""Adapters held in memory as tensors that a session can take as inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loraport.adapter import ModuleKind
from loraport.bundle.content_hash import ContentHash
from loraport.bundle.slots import Slot, SlotTable
from loraport.errors import LoraportError, Problems
from loraport.naming import weight_name
from loraport.runtime.packed_file import read_whole
from loraport.runtime.values import as_value

_NUMPY_DTYPES = {"FLOAT": np.float32, "FLOAT16": np.float16, "DOUBLE": np.float64}


@dataclass(frozen=True, eq=False)
class ResidentAdapter:
    """The tensors of one adapter, or of a blend, on the session's device.

    Attributes:
        values: Graph input → ``onnxruntime.OrtValue``.
        nbytes: Their size.
        owners: What must live as long as the values.
    """

    values: Mapping[str, Any]
    nbytes: int
    owners: tuple[Any, ...] = ()


def read_packed(
    file: Path, table: SlotTable, expected: ContentHash | None = None
) -> dict[str, np.ndarray]:
    """Read a packed adapter and check it against the slot table.

    Args:
        file: ``.safetensors`` with tensors named like the slots' inputs.
        table: The slot table.
        expected: What the file's content must hash to; not compared unless given.

    Raises:
        LoraportError: Naming every tensor that has no slot or does not fit it, or the file if it
            is damaged.
    """
    tensors = read_whole(file, expected)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    problems = Problems()
    known = set(table.inputs())
    for name in shapes.keys() - known:
        problems.add(name, "a slot input of this bundle", "none of this name")
    for slot in table.slots:
        _check_slot(slot, shapes, problems)
    for replacement in table.replacements:
        got = shapes.get(replacement.input, replacement.shape)
        if got != replacement.shape:
            problems.add(replacement.input, f"{list(replacement.shape)}", f"{list(got)}")
    problems.raise_if_any(f"{file} does not fit the bundle's slots")
    return tensors


def _check_slot(slot: Slot, shapes: Mapping[str, tuple[int, ...]], problems: Problems) -> None:
    """Note what does not fit one slot; a slot may be left alone, but not half-filled."""
    entries = slot.inputs
    present = {role: shapes[entry.name] for role, entry in entries.items() if entry.name in shapes}
    if not present:
        return
    for role in ("lora_A", "lora_B"):
        if role not in present:
            problems.add(entries[role].name, "the partner of the slot's others", "no such tensor")
    ranks = set()
    for role, shape in present.items():
        entry = entries[role]
        if not entry.fits(shape):
            expected = f"[{', '.join('r' if isinstance(s, str) else str(s) for s in entry.shape)}]"
            problems.add(entry.name, expected, f"{list(shape)}")
        elif entry.rank_axis is not None:
            ranks.add(shape[entry.rank_axis])
    if len(ranks) > 1:
        problems.add(slot.name, "lora_A and lora_B of one rank", f"ranks {sorted(ranks)}")


def blend_packed(
    parts: list[tuple[Mapping[str, np.ndarray], float]],
    table: SlotTable,
    base_values: Mapping[str, np.ndarray] | None = None,
) -> dict[str, np.ndarray]:
    """Return packed tensors that equal the weighted sum of several adapters.

    Ranks are concatenated and each strength is multiplied into its ``B`` in float32 or wider, so
    the result is exactly ``Σ strength_i * update_i``, with one rounding of ``B`` to its dtype.
    Gains move from one by ``Σ strength_i * (gain_i - 1)``, biases add up; a replaced parameter
    moves from the base's by ``Σ strength_i * (W_i - W)``.

    Args:
        parts: Packed tensors and strength of each adapter.
        table: The slot table.
        base_values: Graph input → the base's value, of the parameters that can be replaced.

    Raises:
        LoraportError: If one adapter has a gain (DoRA) where another, or it itself at another
            strength than 1, replaces the weight: that is no sum of two changes; or if a number
            leaves its dtype's range.
    """
    if len(parts) == 1 and parts[0][1] == 1.0:
        return dict(parts[0][0])
    try:
        with np.errstate(over="raise"):
            return _blended(parts, table, base_values or {})
    except FloatingPointError as error:
        said = ", ".join(f"{strength:g}" for _, strength in parts)
        raise LoraportError(
            f"strengths {said}: expected sums that the slots' dtype holds, got larger ones; use "
            "smaller strengths"
        ) from error


def _blended(
    parts: list[tuple[Mapping[str, np.ndarray], float]],
    table: SlotTable,
    base_values: Mapping[str, np.ndarray],
) -> dict[str, np.ndarray]:
    blended: dict[str, np.ndarray] = {}
    for slot in table.slots:
        for role, entry in slot.inputs.items():
            present = [
                (each[entry.name], strength) for each, strength in parts if entry.name in each
            ]
            if not present:
                continue
            dtype, axis = present[0][0].dtype, entry.rank_axis
            if role == "lora_A" and axis is not None:
                whole = np.concatenate([tensor for tensor, _ in present], axis)
            else:
                wide = np.promote_types(dtype, np.float32)
                moved = [
                    (tensor.astype(wide) - wide.type(entry.neutral)) * wide.type(strength)
                    for tensor, strength in present
                ]
                if axis is None:
                    whole = np.sum(moved, axis=0) + wide.type(entry.neutral)
                else:
                    whole = np.concatenate(moved, axis)
            blended[entry.name] = whole.astype(dtype)
    _refuse_products(blended, table)
    for replacement in table.replacements:
        name = replacement.input
        found = [(tensors[name], strength) for tensors, strength in parts if name in tensors]
        if len(found) == 1 and found[0][1] == 1.0:
            blended[name] = found[0][0]
        elif found:
            blended[name] = _moved(found, base_values[name])
            _refuse_negative(replacement.parameter, blended[name])
    return blended


def _moved(parts: list[tuple[np.ndarray, float]], base: np.ndarray) -> np.ndarray:
    """Return ``W + Σ strength_i * (W_i - W)``, rounded once."""
    start = base.astype(np.float64)
    moved = start.copy()
    for tensor, strength in parts:
        moved += strength * (tensor.astype(np.float64) - start)
    return moved.astype(base.dtype)


def _refuse_negative(parameter: str, values: np.ndarray) -> None:
    if parameter.endswith(".running_var") and (lowest := float(values.min())) < 0:
        raise LoraportError(
            f"{parameter}: expected a variance of zero or more in the blend, got {lowest:.3g}; use "
            "smaller strengths"
        )


def _refuse_products(blended: Mapping[str, np.ndarray], table: SlotTable) -> None:
    replaceable = {replacement.parameter: replacement.input for replacement in table.replacements}
    problems = Problems()
    for slot in table.slots:
        if not slot.gain or slot.input_gain not in blended:
            continue
        for member in slot.members:
            if replaceable.get(weight_name(member.module_path)) in blended:
                problems.add(
                    member.module_path,
                    "DoRA or a replaced weight",
                    "both",
                    "use one adapter alone at strength 1",
                )
    problems.raise_if_any("these adapters cannot be blended")


def make_resident(tensors: Mapping[str, np.ndarray], device: str) -> ResidentAdapter:
    """Put packed tensors on a device.

    Args:
        tensors: Graph input → tensor.
        device: ``"cpu"`` or ``"cuda"``.
    """
    values, owners = {}, []
    for name, tensor in tensors.items():
        values[name], array = as_value(tensor, device)
        owners.append(array)
    return ResidentAdapter(values, sum(array.nbytes for array in owners), tuple(owners))


def empty_slots(table: SlotTable, device: str) -> dict[str, Any]:
    """Return rank-0 defaults for slots that no adapter fills: less work than the graph's rank 1.

    As a session's own defaults they are not given anew in every run, which for hundreds of inputs
    takes as long as the work that they save.

    Only for linear layers on the CPU, whose kernels take empty matrices; none where rows have
    adapters of their own, whose columns are counted.

    Returns:
        Graph input → ``onnxruntime.OrtValue``.
    """
    if device != "cpu" or table.per_row:
        return {}
    empty = {}
    for slot, _, entry in table.low_rank_inputs():
        dtype = _NUMPY_DTYPES.get(slot.dtype)
        if slot.kind is ModuleKind.LINEAR and dtype is not None and entry.rank_axis is not None:
            shape = [0 if isinstance(size, str) else size for size in entry.shape]
            empty[entry.name] = as_value(np.zeros(shape, dtype), device)[0]
    return empty
