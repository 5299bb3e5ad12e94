"""The tensors that fill one slot.

The updates of a slot's modules are laid side by side: ``A`` parts are concatenated along the
rank, ``B`` is block-diagonal, so each module sees only its own part. The scaling (and the gain,
so that updates of several adapters can be added up) is folded into ``B`` in float32, then all is
rounded once to the slot's element type; see `rounded_factors` for what leaves its range.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir
import torch

from converters.onnx.graph.torch_dtypes import TORCH_DTYPES
from converters.rounded_factors import rounded_factors
from loraport.adapter import ModuleKind
from loraport.bundle.slots import Slot
from loraport.errors import Problems
from loraport.update import LowRankUpdate


def slot_tensors(slot: Slot, updates: Mapping[str, LowRankUpdate]) -> dict[str, torch.Tensor]:
    """Return what fills one slot; a part that no module of the adapter has is left out.

    Args:
        slot: The slot.
        updates: Module path → its update; at least one of the slot's modules.
    """
    present = [
        (member, updates[member.module_path])
        for member in slot.members
        if member.module_path in updates
    ]
    dtype = TORCH_DTYPES[ir.DataType[slot.dtype].name]
    rank = sum(update.rank for _, update in present)
    parts = []  # of A, [r, in] each
    b = torch.zeros(slot.out_features, rank, dtype=dtype)
    gain, bias = torch.ones(slot.out_features), torch.zeros(slot.out_features)
    start = 0
    for member, update in present:
        rows, columns = slice(member.start, member.stop), slice(start, start + update.rank)
        scaled = update.b.float() * update.scaling
        if update.gain is not None:
            gain[rows] = update.gain.float()
            scaled *= update.gain.float()[:, None]
        part, b[rows, columns] = rounded_factors(update.a.float(), scaled, dtype)
        parts.append(part)
        if update.bias is not None:
            bias[rows] = update.bias.float()
        start = columns.stop
    a = torch.cat(parts)
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
    return {name: tensor.to(dtype).contiguous() for name, tensor in filled.items()}


def require_finite(dtype: str, filled: Mapping[str, torch.Tensor], problems: Problems) -> None:
    """Note what is no number: a diverged training, or values too large for the slot's type."""
    for name, tensor in filled.items():
        count = int(tensor.numel() - tensor.isfinite().sum())
        if count:
            remedy = "look at the training, or export in a wider precision"
            problems.add(name, f"finite numbers as {dtype}", f"{count} others", remedy)
