"""The only place where a LoRA scaling is computed.

``scaling = alpha / r`` (Hu et al. 2021, arXiv:2106.09685) or, with rank
stabilisation, ``alpha / sqrt(r)`` (Kalajdzievski 2023, arXiv:2312.03732).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from loraport.errors import LoraportError
from loraport.patterns import Patterns


def lora_scaling(rank: int, alpha: float, *, use_rslora: bool = False) -> float:
    """Return the factor on ``B (A x)``.

    Args:
        rank: Number of rows of ``A``, at least 1.
        alpha: ``lora_alpha``, finite.
        use_rslora: Divide by ``sqrt(rank)`` rather than by ``rank``.

    Raises:
        LoraportError: If ``rank`` is below 1 or ``alpha`` is not finite.

    >>> lora_scaling(8, 16)
    2.0
    >>> lora_scaling(16, 16, use_rslora=True)
    4.0
    """
    if rank < 1:
        raise LoraportError(f"LoRA rank: expected at least 1, got {rank}")
    if not math.isfinite(alpha):
        raise LoraportError(f"lora_alpha: expected a finite number, got {alpha}")
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank


def alpha_for(rank: int, scaling: float, *, use_rslora: bool = False) -> float:
    """Return the ``alpha`` that gives ``scaling`` at this rank: the inverse of `lora_scaling`."""
    return scaling / lora_scaling(rank, 1.0, use_rslora=use_rslora)


@dataclass(frozen=True)
class RankAndAlpha:
    r"""Rank and alpha of every module, with PEFT's patterns.

    A pattern key matches a module path as the regular expression
    ``(.*\.)?(KEY)$`` does; the first key that matches wins.

    Attributes:
        r: Rank where no pattern matches.
        lora_alpha: Alpha where no pattern matches.
        rank_pattern: Pattern → rank.
        alpha_pattern: Pattern → alpha.
    """

    r: int = 8
    lora_alpha: float = 8
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def rank(self, module_path: str) -> int:
        """Return the rank of one module."""
        pattern = self._ranks.first(module_path)
        return int(self.r if pattern is None else self.rank_pattern[pattern])

    def alpha(self, module_path: str) -> float:
        """Return the alpha of one module."""
        pattern = self._alphas.first(module_path)
        return float(self.lora_alpha if pattern is None else self.alpha_pattern[pattern])

    @cached_property
    def _ranks(self) -> Patterns:
        return Patterns(self.rank_pattern)

    @cached_property
    def _alphas(self) -> Patterns:
        return Patterns(self.alpha_pattern)
