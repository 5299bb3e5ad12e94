"""Pack an adapter for a slot table: the tensors that its slots take as inputs.

Per slot, the updates of its modules are laid side by side: ``A`` parts are concatenated
along the rank, ``B`` is block-diagonal, so each module sees only its own part. The scaling is
folded into ``B`` in float32, then both are rounded once to the slot's element type.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir
import torch

from loraport.adapter import Adapter, ModuleKind
from loraport.bundle.slots import Slot, SlotTable
from loraport.errors import Problems
from loraport.update import LowRankUpdate

_TORCH_DTYPES = {
    "FLOAT": torch.float32,
    "FLOAT16": torch.float16,
    "BFLOAT16": torch.bfloat16,
    "DOUBLE": torch.float64,
}
_HEADLINE = "the adapter does not fit the exported model's slots"
_MERGE = "merge the adapter and export that"


@dataclass(frozen=True, eq=False)
class PackedAdapter:
    """An adapter as graph inputs.

    Attributes:
        tensors: Graph input → ``A`` ``[in, r]`` or ``B`` ``[r, out]``.
        ranks: Slot name → rank.
        scalings: Module path → the scaling folded into ``B``.
        source_sha256: Content hash of the adapter, `adapter_sha256`.
    """

    tensors: Mapping[str, torch.Tensor]
    ranks: Mapping[str, int]
    scalings: Mapping[str, float]
    source_sha256: str


def pack(adapter: Adapter, table: SlotTable, unslotted: Mapping[str, str]) -> PackedAdapter:
    """Pack an adapter; every tensor of it must find its slot.

    Args:
        adapter: What to pack.
        table: The exported model's slots.
        unslotted: Module path → why the export gave it no slot, for the error text.

    Raises:
        LoraportError: Naming everything in the adapter that has no slot or does not fit.
    """
    problems = Problems()
    places = table.modules()
    updates: dict[str, LowRankUpdate] = {}
    for path, module in adapter.modules.items():
        if module.magnitude is not None or module.kind is not ModuleKind.LINEAR:
            variant = "DoRA" if module.magnitude is not None else module.kind.value
            problems.add(path, "plain LoRA on a linear layer", variant, _MERGE)
            continue
        if path not in places:
            reason = unslotted.get(path, "the exported model has no such module")
            problems.add(path, "a slot for this module", "none", reason)
            continue
        update = module.lower()
        slot, member = places[path]
        expected = (slot.in_features, member.stop - member.start)
        if (got := (update.a.shape[1], update.b.shape[0])) != expected:
            problems.add(path, f"in and out features {expected}", f"{tuple(got)}")
        if update.bias is not None:
            problems.add(path, "no bias", "lora_bias", _MERGE)
        updates[path] = update
    for parameter in adapter.replacements:
        problems.add(
            parameter,
            "low-rank updates only",
            "a whole parameter (modules_to_save, bias or trained tokens)",
            _MERGE,
        )
    if not updates and not problems.found:
        problems.add("the adapter", "low-rank updates", "none")
    problems.raise_if_any(_HEADLINE)
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for slot in table.slots:
        if any(member.module_path in updates for member in slot.members):
            a, b = _slot_tensors(slot, updates)
            tensors[slot.input_a], tensors[slot.input_b] = a, b
            ranks[slot.name] = int(a.shape[1])
            _require_finite(slot, a, b, problems)
    problems.raise_if_any(_HEADLINE)
    return PackedAdapter(
        tensors=tensors,
        ranks=ranks,
        scalings={path: update.scaling for path, update in updates.items()},
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


def _slot_tensors(
    slot: Slot, updates: Mapping[str, LowRankUpdate]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ``A`` ``[in, r]`` and block-diagonal ``B`` ``[r, out]`` of one slot."""
    present = [
        (member, updates[member.module_path])
        for member in slot.members
        if member.module_path in updates
    ]
    rank = sum(update.rank for _, update in present)
    a = torch.cat([update.a.float() for _, update in present]).T
    b = torch.zeros(rank, slot.out_features)
    start = 0
    for member, update in present:
        stop = start + update.rank
        b[start:stop, member.start : member.stop] = (update.b.float() * update.scaling).T
        start = stop
    dtype = _TORCH_DTYPES[ir.DataType[slot.dtype].name]
    return a.to(dtype).contiguous(), b.to(dtype).contiguous()


def _require_finite(slot: Slot, a: torch.Tensor, b: torch.Tensor, problems: Problems) -> None:
    """Note what is no number: a diverged training, or values too large for the slot's type."""
    for name, tensor in ((slot.input_a, a), (slot.input_b, b)):
        count = int(tensor.numel() - tensor.isfinite().sum())
        if count:
            remedy = "look at the training, or export in a wider precision"
            problems.add(name, f"finite numbers as {slot.dtype}", f"{count} others", remedy)
