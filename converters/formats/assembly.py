"""Put a module together from the tensors that a foreign file holds for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraport.adapter import LoraModule, ModuleKind
from loraport.errors import Problems
from loraport.scaling import alpha_for

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class FoundTensor:
    """A tensor of the file.

    Attributes:
        name: Its name in the file, for messages.
        tensor: Its value, oriented as `LoraModule` asks.
    """

    name: str
    tensor: torch.Tensor


def check_values(name: str, tensor: torch.Tensor, problems: Problems) -> None:
    """Record a problem unless a tensor is floating-point, non-empty and finite."""
    if not tensor.is_floating_point():
        problems.add(name, "a floating-point tensor", str(tensor.dtype))
    elif tensor.numel() == 0:
        problems.add(name, "a tensor with elements", shape_text(tensor))
    elif not tensor.float().isfinite().all():
        problems.add(name, "finite values", "NaN or infinity", "the training diverged; train again")


def assemble(
    path: str,
    found: Mapping[str, FoundTensor],
    problems: Problems,
    *,
    alpha: float | None = None,
    scaling: float | None = None,
    embedding: bool = False,
) -> LoraModule | None:
    """Return a module, or ``None`` with the reasons recorded.

    Args:
        path: Module path.
        found: `LoraModule` field name → tensor: ``lora_A``, ``lora_B``, ``magnitude``.
        problems: Where to record what is wrong.
        alpha: The format's alpha; the rank where neither this nor ``scaling`` is given.
        scaling: The format's factor on ``B (A x)``.
        embedding: The module is an embedding.
    """
    for part in ("lora_A", "lora_B"):
        if part not in found:
            partner = next(iter(found.values())).name
            problems.add(path, f"{part} beside {partner}", "no such tensor", "fetch it again")
            return None
    lora_a, lora_b = found["lora_A"], found["lora_B"]
    shapes = f"{shape_text(lora_a.tensor)} and {shape_text(lora_b.tensor)}"
    a, b = lora_a.tensor, lora_b.tensor
    if a.dim() < 2 or b.dim() != a.dim() or a.numel() == 0 or b.numel() == 0:
        problems.add(f"{lora_a.name}, {lora_b.name}", "two matrices of like dimensions", shapes)
        return None
    if b[0, 0].numel() != 1:
        problems.add(lora_b.name, "a 1x1 kernel", shape_text(b))
        return None
    # A grouped convolution's B has a part of the rank in each group (PEFT's layout).
    groups = a.shape[0] / b.shape[1]
    if groups != 1 and (a.dim() == 2 or not groups.is_integer() or b.shape[0] % int(groups)):
        problems.add(
            f"{lora_a.name}, {lora_b.name}", "one rank in both (A [r, in], B [out, r])", shapes
        )
        return None
    magnitude = found.get("magnitude")
    if magnitude is not None and magnitude.tensor.numel() != b.shape[0]:
        problems.add(magnitude.name, f"[{b.shape[0]}]", shape_text(magnitude.tensor))
        return None
    rank = int(a.shape[0])
    if alpha is None:
        alpha = float(rank) if scaling is None else alpha_for(rank, scaling)
    kind = ModuleKind.EMBEDDING if embedding else ModuleKind.LINEAR
    return LoraModule(
        kind=ModuleKind.CONV if a.dim() > 2 else kind,
        lora_A=a.contiguous(),
        lora_B=b.contiguous(),
        alpha=alpha,
        magnitude=None if magnitude is None else magnitude.tensor.contiguous(),
    )


def shape_text(tensor: torch.Tensor) -> str:
    """Return a tensor's shape as messages show it."""
    return str(list(tensor.shape))
