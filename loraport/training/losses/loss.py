"""What a loss function returns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn

from loraport.errors import LoraportError


class LossSum(NamedTuple):
    """A sum of losses and how many there are.

    Sums, not means, so that accumulated batches of unlike size weigh as one big batch would.

    Attributes:
        total: Sum of the losses, a scalar with a gradient.
        weight: Number of losses summed.
        tokens: What throughput counts: tokens or samples; 0 where it does not matter.
    """

    total: torch.Tensor
    weight: float
    tokens: int = 0


# From model and batch to a `LossSum`, or to a mean that counts as one loss.
LossFunction = Callable[[nn.Module, Any], LossSum | torch.Tensor]


def as_sum(value: LossSum | torch.Tensor) -> LossSum:
    """Return a loss function's value as a sum.

    Raises:
        LoraportError: If it is no scalar, or its weight is not above 0.
    """
    result = value if isinstance(value, LossSum) else LossSum(value, 1.0)
    if not isinstance(result.total, torch.Tensor) or result.total.numel() != 1:
        got = getattr(result.total, "shape", type(result.total).__name__)
        raise LoraportError(f"the loss function: expected a scalar tensor, got {got}")
    if not result.weight > 0:
        raise LoraportError(
            f"the loss function: expected a weight above 0, got {result.weight}; "
            "no part of the batch counts"
        )
    return result
