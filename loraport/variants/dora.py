"""DoRA: ``W' = m * (W + s B A) / ||W + s B A||`` per output row (arXiv:2402.09353).

In the canonical form the gain is ``m / ||W + s B A||``; the norm needs the base weight.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from loraport.base.storage import stored_as_out_in
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
        LoraportError: If the base weight is missing, does not fit, or the module is a grouped
            convolution, for which DoRA is not defined.
    """
    if module.magnitude is None:
        return update
    if base_weight is None:
        raise LoraportError(
            "DoRA: expected the base weight, which its gain depends on, got none; "
            "give the base the adapter was trained on"
        )
    if module.groups > 1:
        raise LoraportError(
            "DoRA on a convolution with groups: expected groups=1; train plain LoRA"
        )
    weight = stored_as_out_in(base_weight, module)
    norm = (weight + update.delta()).norm(dim=1)
    return replace(update, gain=module.magnitude.float().flatten() / norm)
