"""LoRA variants: each refines the plain update with what its extra tensors mean.

A variant is one file with one function ``refine(update, module, base_weight)``, which returns
the update unchanged where the variant does not apply. Adding a variant is adding its file here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from loraport.adapter import LoraModule, ModuleKind
from loraport.errors import LoraportError
from loraport.update import LowRankUpdate
from loraport.variants import bias, dora

if TYPE_CHECKING:
    import torch


def ungrouped_b(module: LoraModule) -> torch.Tensor:
    """Return ``B`` ``[out, r]``, a grouped convolution's as a block-diagonal matrix.

    Each group of ``B`` reads its own ``r / groups`` rows of ``A`` alone.
    """
    flat = module.lora_B.flatten(1)
    if module.groups == 1:
        return flat
    out, own = flat.shape
    wide = flat.new_zeros(out, module.rank)
    for group in range(module.groups):
        rows = slice(group * out // module.groups, (group + 1) * out // module.groups)
        wide[rows, group * own : (group + 1) * own] = flat[rows]
    return wide


class Refine(Protocol):
    """Turns the update so far into the one that also honours this variant."""

    def __call__(
        self, update: LowRankUpdate, module: LoraModule, base_weight: torch.Tensor | None
    ) -> LowRankUpdate:
        """Return the refined update, or ``update`` where the variant does not apply."""
        ...


_VARIANTS: tuple[Refine, ...] = (bias.refine, dora.refine)


def lower(module: LoraModule, base_weight: torch.Tensor | None = None) -> LowRankUpdate:
    """Return the canonical form of a module's update.

    Args:
        module: Of any variant.
        base_weight: The base's weight as stored; only variants whose update depends on
            it (DoRA) need it.

    Raises:
        LoraportError: If it adapts no module, or needs ``base_weight`` and that is missing or
            does not fit.
    """
    if module.kind is ModuleKind.EXPERTS:
        raise LoraportError(
            "LoRA on a parameter rather than a module (fused experts above all): expected a "
            f"layer's matrix to update, got a parameter of {module.experts} as it is stored; merge "
            "it into the base"
        )
    update = LowRankUpdate(
        a=module.lora_A.flatten(1), b=ungrouped_b(module), scaling=module.scaling
    )
    for refine in _VARIANTS:
        update = refine(update, module, base_weight)
    return update
