"""The only place where a LoRA scaling is computed.

``scaling = alpha / r`` (Hu et al. 2021, arXiv:2106.09685) or, with rank
stabilisation, ``alpha / sqrt(r)`` (Kalajdzievski 2023, arXiv:2312.03732).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from loraport.errors import LoraportError


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
        return int(_first_match(self.rank_pattern, module_path, self.r))

    def alpha(self, module_path: str) -> float:
        """Return the alpha of one module."""
        return float(_first_match(self.alpha_pattern, module_path, self.lora_alpha))


def _first_match(patterns: Mapping[str, float], module_path: str, default: float) -> float:
    for pattern, value in patterns.items():
        try:
            matched = re.match(rf"(.*\.)?({pattern})$", module_path)
        except re.error as error:
            raise LoraportError(
                f"pattern {pattern!r}: expected a regular expression, got {error}"
            ) from error
        if matched:
            return value
    return default
