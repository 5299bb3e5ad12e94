"""The canonical form that every LoRA variant lowers to and every destination consumes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from loraport.errors import LoraportError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, eq=False)
class LowRankUpdate:
    """A module's update: ``y = gain * (W x + scaling * B (A x)) + base_bias + bias``.

    ``W`` is seen as ``[out, in]`` whatever its storage: a convolution's kernel is
    flattened to ``in = channels * kernel`` (the channels of all groups, zeros outside a
    group's own), an embedding is a linear map of the one-hot
    token (``in`` = vocabulary).

    Attributes:
        a: ``[r, in]``.
        b: ``[out, r]``.
        scaling: Factor on ``B (A x)``.
        gain: ``[out]`` or ``None`` for ones.
        bias: ``[out]``, added to the base's own bias, or ``None`` for zeros.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    gain: torch.Tensor | None = None
    bias: torch.Tensor | None = None

    @property
    def rank(self) -> int:
        """Number of rows of ``a``."""
        return int(self.a.shape[0])

    def delta(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """Return ``scaling * B A`` ``[out, in]``, computed in ``dtype`` (float32 unless told).

        Args:
            dtype: float32 or float64.
        """
        import torch

        dtype = dtype or torch.float32
        return (self.b.to(dtype) @ self.a.to(dtype)) * self.scaling


def weighted_sum(updates: Sequence[tuple[LowRankUpdate, float]]) -> LowRankUpdate:
    """Return one update that equals ``Σ strength_i * update_i`` exactly, by concatenating ranks.

    ``A = [A_1; A_2; ...]``, ``B = [s_1 c_1 B_1, s_2 c_2 B_2, ...]`` with scaling 1, computed in
    float32. No cross terms arise, unlike adding the factors.

    Args:
        updates: Pairs of update and strength; at least one.

    Raises:
        LoraportError: If an update has a gain and there are several or its strength is
            not 1: gains do not add up.
    """
    import torch

    if len(updates) == 1 and updates[0][1] == 1.0:
        return updates[0][0]
    if any(update.gain is not None for update, _ in updates):
        raise LoraportError(
            "a weighted sum of adapters: expected plain low-rank updates, got one with a gain "
            "(DoRA); use it alone at strength 1, or merge it into the base first"
        )
    biases = [
        strength * update.bias.float() for update, strength in updates if update.bias is not None
    ]
    return LowRankUpdate(
        a=torch.cat([update.a.float() for update, _ in updates]),
        b=torch.cat(
            [update.b.float() * (update.scaling * strength) for update, strength in updates], dim=1
        ),
        scaling=1.0,
        bias=torch.stack(biases).sum(0) if biases else None,
    )


def fold_scaling(update: LowRankUpdate) -> LowRankUpdate:
    """Return the same update with the scaling multiplied into ``b`` once, in float32."""
    return replace(update, b=update.b.float() * update.scaling, scaling=1.0)
