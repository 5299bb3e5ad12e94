"""LoRA with a bias on ``B`` (PEFT's ``lora_bias``): ``y = W x + s (B A x + c)``."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loraport.update import LowRankUpdate

if TYPE_CHECKING:
    import torch

    from loraport.adapter import LoraModule


def refine(
    update: LowRankUpdate,
    module: LoraModule,
    base_weight: torch.Tensor | None,  # noqa: ARG001  one signature for all variants
) -> LowRankUpdate:
    """Add ``scaling * lora_B_bias`` to the update's bias, in float32."""
    if module.lora_B_bias is None:
        return update
    return replace(update, bias=module.lora_B_bias.float() * update.scaling)
