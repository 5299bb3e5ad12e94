"""DoRA: ``W' = m * (W + s B A) / ||W + s B A||`` per output row (arXiv:2402.09353).

In the canonical form the gain is ``m / ||W + s B A||``; the norm needs the base weight.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loraport.errors import LoraportError
from loraport.update import LowRankUpdate

if TYPE_CHECKING:
    import torch

    from loraport.adapter import LoraModule


def refine(
    update: LowRankUpdate, module: LoraModule, base_weight: torch.Tensor | None
) -> LowRankUpdate:
    """Set the gain from the magnitude vector and the base weight, in float32.

    Raises:
        LoraportError: If the base weight is missing.
    """
    if module.magnitude is None:
        return update
    if base_weight is None:
        raise LoraportError(
            "DoRA: expected the base weight, which its gain depends on, got none; "
            "give the base the adapter was trained on"
        )
    weight = stored_as_out_in(base_weight, module)
    norm = (weight + update.delta()).norm(dim=1)
    return replace(update, gain=module.magnitude.float().flatten() / norm)


def stored_as_out_in(base_weight: torch.Tensor, module: LoraModule) -> torch.Tensor:
    """Return the base weight as float32 ``[out, in]``, whatever its storage."""
    from loraport.adapter import ModuleKind

    weight = base_weight.float().flatten(1)
    transposed = module.kind is ModuleKind.EMBEDDING or module.fan_in_fan_out
    return weight.T if transposed else weight
