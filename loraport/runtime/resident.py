"""Adapters held in memory as tensors that a session can take as inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loraport.bundle.slots import SlotTable
from loraport.checkpoint import Checkpoint
from loraport.errors import LoraportError, Problems

if TYPE_CHECKING:
    import torch

_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


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


def read_packed(file: Path, table: SlotTable) -> dict[str, torch.Tensor]:
    """Read a packed adapter and check it against the slot table.

    Args:
        file: ``.safetensors`` with tensors named like the slots' inputs.
        table: The slot table.

    Raises:
        LoraportError: Naming every tensor that has no slot or does not fit it.
    """
    checkpoint = Checkpoint(file)
    shapes = {name: checkpoint.info(name).shape for name in checkpoint}
    problems = Problems()
    known = set(table.inputs())
    for name in shapes.keys() - known:
        problems.add(name, "a slot input of this bundle", "none of this name")
    for slot in table.slots:
        a, b = shapes.get(slot.input_a), shapes.get(slot.input_b)
        if a is None and b is None:
            continue
        if a is None or b is None:
            missing = slot.input_a if a is None else slot.input_b
            problems.add(missing, "the partner of the other matrix", "no such tensor")
        elif len(a) != 2 or len(b) != 2 or a[1] != b[0] or a[1] < 1:
            problems.add(slot.name, "lora_A [in, r] and lora_B [r, out]", f"{list(a)}, {list(b)}")
        elif (a[0], b[1]) != (slot.in_features, slot.out_features):
            expected = f"[{slot.in_features}, r] and [r, {slot.out_features}]"
            problems.add(slot.name, expected, f"{list(a)} and {list(b)}")
    problems.raise_if_any(f"{file} does not fit the bundle's slots")
    return {name: checkpoint.load(name) for name in checkpoint}


def blend_packed(
    parts: list[tuple[Mapping[str, torch.Tensor], float]], table: SlotTable
) -> dict[str, torch.Tensor]:
    """Return packed tensors that equal the weighted sum of several adapters.

    Ranks are concatenated and each strength is multiplied into its ``B`` in float32, so the
    result is exactly ``Σ strength_i * update_i``, with one rounding of ``B`` to its dtype.

    Args:
        parts: Packed tensors and strength of each adapter.
        table: The slot table.
    """
    import torch

    if len(parts) == 1 and parts[0][1] == 1.0:
        return dict(parts[0][0])
    blended: dict[str, torch.Tensor] = {}
    for slot in table.slots:
        present = [(tensors, strength) for tensors, strength in parts if slot.input_a in tensors]
        if not present:
            continue
        blended[slot.input_a] = torch.cat([tensors[slot.input_a] for tensors, _ in present], dim=1)
        scaled = [
            (tensors[slot.input_b].float() * strength).to(tensors[slot.input_b].dtype)
            for tensors, strength in present
        ]
        blended[slot.input_b] = torch.cat(scaled)
    return blended


def make_resident(tensors: Mapping[str, torch.Tensor], device: str) -> ResidentAdapter:
    """Put packed tensors on a device.

    Args:
        tensors: Graph input → tensor.
        device: ``"cpu"`` or ``"cuda"``.
    """
    import onnxruntime
    import torch

    values, owners = {}, []
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            array = tensor.view(torch.int16).numpy()
            value = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, _BFLOAT16)
            if device != "cpu":
                raise LoraportError("bfloat16 adapters: expected the CPU provider, got " + device)
        else:
            array = tensor.numpy()
            value = onnxruntime.OrtValue.ortvalue_from_numpy(array, device, 0)
        values[name] = value
        owners.append(array)
    return ResidentAdapter(values, sum(array.nbytes for array in owners), tuple(owners))


def as_numpy(value: Any) -> np.ndarray:
    """Return an ``OrtValue``'s content as an array of its own."""
    return np.array(value.numpy())
