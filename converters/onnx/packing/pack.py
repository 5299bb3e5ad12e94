"""Pack an adapter for a slot table: the tensors that its slots take as inputs."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from converters.onnx.packing.fitting import Base, fit
from converters.onnx.slots.slot_tensors import require_finite, slot_tensors
from loraport.adapter import Adapter, require_adapter
from loraport.bundle.slots import SlotTable
from loraport.errors import Problems

_HEADLINE = "the adapter does not fit the exported model's slots"


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter as graph inputs.

    Attributes:
        tensors: Graph input → tensor of the shape that the slot table says.
        ranks: Slot name → rank.
        scalings: Module path → the scaling folded into ``B``.
        source_sha256: Content hash of the adapter, `adapter_sha256`.
    """

    tensors: Mapping[str, torch.Tensor]
    ranks: Mapping[str, int]
    scalings: Mapping[str, float]
    source_sha256: str


def pack(
    adapter: Adapter,
    table: SlotTable,
    unslotted: Mapping[str, str],
    base: Base | None = None,
) -> PackedAdapter:
    """Pack an adapter; every tensor of it must find its slot.

    Args:
        adapter: What to pack.
        table: The exported model's slots.
        unslotted: Module or parameter path → why the export gave it no slot, for the error text.
        base: The base's weights; DoRA and trained tokens need them.

    Raises:
        LoraportError: Naming everything in the adapter that has no slot or does not fit.
    """
    require_adapter(adapter)
    problems = Problems()
    fitted = fit(adapter, table, unslotted, base, problems)
    if not fitted.updates and not fitted.whole and not problems.found:
        problems.add("the adapter", "low-rank updates or whole parameters", "none")
    problems.raise_if_any(_HEADLINE)
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for slot in table.slots:
        if any(member.module_path in fitted.updates for member in slot.members):
            filled = slot_tensors(slot, fitted.updates)
            tensors |= filled
            ranks[slot.name] = filled[slot.input_a].shape[slot.inputs["lora_A"].rank_axis or 0]
            require_finite(slot.dtype, filled, problems)
    problems.raise_if_any(_HEADLINE)
    return PackedAdapter(
        tensors=tensors | fitted.whole,
        ranks=ranks,
        scalings=fitted.scalings,
        source_sha256=adapter_sha256(adapter),
    )


def adapter_sha256(adapter: Adapter) -> str:
    """Return a hash of everything the adapter computes: tensors, scalings and their places."""
    digest = hashlib.sha256()
    for path, module in sorted(adapter.modules.items()):
        digest.update(f"{path} {module.kind} {module.scaling!r}".encode())
        for name, tensor in module.tensors().items():
            _hash_tensor(digest, name, tensor)
    for path, replacement in sorted(adapter.replacements.items()):
        _hash_tensor(digest, f"{path} {replacement.rows}", replacement.tensor)
    return digest.hexdigest()


def _hash_tensor(digest: hashlib._Hash, name: str, tensor: torch.Tensor) -> None:
    digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
    digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
