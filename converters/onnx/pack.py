"""Pack an adapter for a slot table: the tensors that its slots take as inputs.

Per slot, the updates of its modules are laid side by side: ``A`` parts are concatenated
along the rank, ``B`` is block-diagonal, so each module sees only its own part. The scaling (and
the gain, so that updates of several adapters can be added up) is folded into ``B`` in float32,
then all is rounded once to the slot's element type.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
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
        tensors: Graph input → tensor of the shape that `Slot.inputs` says.
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
    base_weight: Callable[[str], torch.Tensor] | None = None,
) -> PackedAdapter:
    """Pack an adapter; every tensor of it must find its slot.

    Args:
        adapter: What to pack.
        table: The exported model's slots.
        unslotted: Module path → why the export gave it no slot, for the error text.
        base_weight: Gives the base's weight of a module, as stored; DoRA needs it.

    Raises:
        LoraportError: Naming everything in the adapter that has no slot or does not fit.
    """
    problems = Problems()
    places = table.modules()
    updates: dict[str, LowRankUpdate] = {}
    for path, module in adapter.modules.items():
        if path not in places:
            reason = unslotted.get(path, "the exported model has no such module")
            if path not in unslotted and module.kind is not ModuleKind.LINEAR:
                reason = _export_with(module.kind.value)
            problems.add(path, "a slot for this module", "none", reason)
            continue
        slot, member = places[path]
        if module.kind is not slot.kind:
            problems.add(path, f"an update of a {slot.kind.value} module", module.kind.value)
            continue
        expected = (slot.in_features, *slot.kernel, member.stop - member.start)
        if (got := (*module.lora_A.shape[1:], module.lora_B.shape[0])) != expected:
            problems.add(path, f"in and out features {expected}", f"{tuple(got)}")
            continue
        if module.magnitude is not None and not slot.gain:
            problems.add(path, "a slot with a gain", "DoRA", _export_with("gain"))
            continue
        weight = None
        if module.magnitude is not None:
            if base_weight is None:
                problems.add(path, "the base, which DoRA's gain depends on", "none", _MERGE)
                continue
            weight = base_weight(path)
        update = module.lower(weight)
        if update.bias is not None and not slot.bias:
            problems.add(path, "a slot with a bias", "lora_bias", _export_with("bias"))
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
            filled = _slot_tensors(slot, updates)
            tensors |= filled
            ranks[slot.name] = filled[slot.input_a].shape[slot.inputs()["lora_A"].rank_axis or 0]
            _require_finite(slot, filled, problems)
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


def _slot_tensors(slot: Slot, updates: Mapping[str, LowRankUpdate]) -> dict[str, torch.Tensor]:
    """Return what fills one slot; a part that no module of the adapter has is left out."""
    present = [
        (member, updates[member.module_path])
        for member in slot.members
        if member.module_path in updates
    ]
    rank = sum(update.rank for _, update in present)
    a = torch.cat([update.a.float() for _, update in present])  # [r, in]
    b = torch.zeros(slot.out_features, rank)
    gain, bias = torch.ones(slot.out_features), torch.zeros(slot.out_features)
    start = 0
    for member, update in present:
        rows, columns = slice(member.start, member.stop), slice(start, start + update.rank)
        b[rows, columns] = update.b.float() * update.scaling
        if update.gain is not None:
            gain[rows] = update.gain.float()
            b[rows, columns] *= update.gain.float()[:, None]
        if update.bias is not None:
            bias[rows] = update.bias.float()
        start = columns.stop
    if slot.kind is ModuleKind.CONV:
        a = a.reshape(rank, slot.in_features, *slot.kernel)
        b = b.reshape(slot.out_features, rank, *(1 for _ in slot.kernel))
    else:
        a, b = a.T, b.T
    filled = {slot.input_a: a, slot.input_b: b}
    if any(update.gain is not None for _, update in present):
        filled[slot.input_gain] = gain
    if any(update.bias is not None for _, update in present):
        filled[slot.input_bias] = bias
    dtype = _TORCH_DTYPES[ir.DataType[slot.dtype].name]
    return {name: tensor.to(dtype).contiguous() for name, tensor in filled.items()}


def _require_finite(slot: Slot, filled: Mapping[str, torch.Tensor], problems: Problems) -> None:
    """Note what is no number: a diverged training, or values too large for the slot's type."""
    for name, tensor in filled.items():
        count = int(tensor.numel() - tensor.isfinite().sum())
        if count:
            remedy = "look at the training, or export in a wider precision"
            problems.add(name, f"finite numbers as {slot.dtype}", f"{count} others", remedy)


def _export_with(variant: str) -> str:
    return f"export again with {variant} among --slots, or {_MERGE}"
