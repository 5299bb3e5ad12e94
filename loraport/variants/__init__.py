"""LoRA variants: each refines the plain update with what its extra tensors mean.

A variant is one file with one function ``refine(update, module, base_weight)``, which returns
the update unchanged where the variant does not apply. Adding a variant is adding its file here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from loraport.update import LowRankUpdate
from loraport.variants import bias, dora

if TYPE_CHECKING:
    import torch

    from loraport.adapter import LoraModule


class Refine(Protocol):
    """Turns the update so far into the one that also honours this variant."""

    def __call__(
        self, update: LowRankUpdate, module: LoraModule, base_weight: torch.Tensor | None
    ) -> LowRankUpdate:
        """Return the refined update, or ``update`` where the variant does not apply."""
        ...


_VARIANTS: tuple[Refine, ...] = (bias.refine, dora.refine)


def lower(module: LoraModule, base_weight: torch.Tensor | None = None) -> LowRankUpdate:
    """Lower one module to the canonical form; see `LoraModule.lower`."""
    update = LowRankUpdate(
        a=module.lora_A.flatten(1), b=module.lora_B.flatten(1), scaling=module.scaling
    )
    for refine in _VARIANTS:
        update = refine(update, module, base_weight)
    return update
