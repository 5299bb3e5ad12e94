"""One module as the inputs of a slot of its own, and back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from converters.formats.assembly import FoundTensor, assemble
from loraport.adapter import LoraModule, ModuleKind
from loraport.errors import Problems
from loraport.naming import slot_a, slot_b, slot_bias, slot_gain

if TYPE_CHECKING:
    import torch


def slot_of_module(
    path: str, module: LoraModule, gain: torch.Tensor | None, problems: Problems
) -> dict[str, torch.Tensor]:
    """Return graph input → tensor.

    Args:
        path: Module path.
        module: With a scaling of 1.
        gain: ``[out]``, for DoRA.
        problems: Where it is noted that no slot takes the module.
    """
    a, b = module.lora_A, module.lora_B
    if module.groups > 1:
        problems.add(path, "a convolution without groups", f"{module.groups} groups")
        return {}
    if module.kind is not ModuleKind.CONV:
        a, b = a.T, b.T  # [in, r], [r, out]
    found = {slot_a(path): a.contiguous(), slot_b(path): b.contiguous()}
    if gain is not None:
        found[slot_b(path)] = (b.double() * _over(gain.double(), b, module)).to(b.dtype)
        found[slot_gain(path)] = gain.to(b.dtype)
    if module.lora_B_bias is not None:
        found[slot_bias(path)] = module.lora_B_bias.contiguous()
    return found


def module_of_slot(
    path: str,
    found: Mapping[str, FoundTensor],
    magnitude: Any,
    problems: Problems,
    *,
    embedding: bool,
) -> LoraModule | None:
    """Return the module, with a scaling of 1, or ``None`` with the reasons recorded.

    Args:
        path: Module path.
        found: ``lora_A``, ``lora_B``, ``lora_gain``, ``lora_bias`` → tensor.
        magnitude: DoRA's as the sidecar has it; the gain does not tell it without the base.
        problems: Where to record what is wrong.
        embedding: The module is an embedding.
    """
    turned = {
        part: replace(entry, tensor=entry.tensor.T) if entry.tensor.dim() == 2 else entry
        for part, entry in found.items()
        if part in ("lora_A", "lora_B")
    }
    if not turned:
        name = next(iter(found.values())).name
        problems.add(name, "lora_A and lora_B beside it", "no such tensors", "fetch it again")
        return None
    module = assemble(path, turned, problems, scaling=1.0, embedding=embedding)
    if module is None:
        return None
    out = int(module.lora_B.shape[0])
    for part in ("lora_gain", "lora_bias"):
        if part in found and tuple(found[part].tensor.shape) != (out,):
            problems.add(found[part].name, f"[{out}]", str(list(found[part].tensor.shape)))
            return None
    if "lora_bias" in found:
        module = replace(module, lora_B_bias=found["lora_bias"].tensor)
    if "lora_gain" in found:
        return _with_magnitude(path, module, found["lora_gain"].tensor, magnitude, problems)
    return module


def _with_magnitude(
    path: str, module: LoraModule, gain: torch.Tensor, magnitude: Any, problems: Problems
) -> LoraModule | None:
    """Take the gain out of ``B`` again and put DoRA's magnitude in."""
    import torch

    out = len(gain)
    whole = isinstance(magnitude, list) and len(magnitude) == out
    if not whole or not all(isinstance(value, int | float) for value in magnitude):
        problems.add(
            path,
            f"DoRA's {out} magnitudes in the file's .json",
            "none" if magnitude is None else "something else",
            "convert the adapter that this file was made from",
        )
        return None
    b = module.lora_B
    divisor = gain.double().where(gain != 0, 1.0).reshape(-1, *(1 for _ in b.shape[1:]))
    return replace(
        module,
        lora_B=(b.double() / divisor).to(b.dtype),
        magnitude=torch.tensor(magnitude, dtype=b.dtype),
    )


def _over(vector: torch.Tensor, b: torch.Tensor, module: LoraModule) -> torch.Tensor:
    """Shape ``[out]`` so that it broadcasts over a slot's ``B``."""
    return (
        vector.reshape(-1, *(1 for _ in b.shape[1:])) if module.kind is ModuleKind.CONV else vector
    )
