"""Ranks that are more than a change of a layer's weight can have."""

from __future__ import annotations

from collections.abc import Iterable
from math import prod

from torch import nn

from loraport.scaling import RankAndAlpha
from loraport.training.lora.lora_layer import LoraLayer
from loraport.training.lora.targets import names_of, select_targets
from loraport.training.options import LoraOptions

_SHOWN = 5


def full_rank(layer: type[LoraLayer], module: nn.Module) -> int:
    """Return the highest rank that a change of a module's weight can have.

    It is ``min(out, in)``; a convolution's kernel is part of what it takes in.
    """
    shape_a, shape_b = layer.shapes(module, 1)  # [1, in, ...] and [out, 1, ...]
    return min(prod(shape_a), prod(shape_b))


def above_full_rank(model: nn.Module, trials: Iterable[LoraOptions]) -> str | None:
    """Return what a user should know of ranks above `full_rank`, if there are any.

    They train, as in PEFT: ``B A`` then has more numbers than what it can be.

    Args:
        model: The base without LoRA layers; one on the meta device will do.
        trials: What is adapted, once or in several ways; of these the highest ranks are told.

    Raises:
        LoraportError: If a selection fails.
    """
    found: dict[str, tuple[int, int]] = {}
    for options in trials:
        ranks = RankAndAlpha(
            options.rank, options.effective_alpha, options.rank_pattern, options.alpha_pattern
        )
        for path, layer in select_targets(model, options).items():
            rank, most = ranks.rank(path), full_rank(layer, model.get_submodule(path))
            if rank > most:
                found[path] = max(found.get(path, (0, most)), (rank, most))
    if not found:
        return None
    kinds = list(dict.fromkeys(found.values()))
    parts = []
    for rank, most in kinds[:_SHOWN]:
        names = names_of(path for path, kind in found.items() if kind == (rank, most))
        parts.append(f"{names} (rank {rank}, smaller dimension {most})")
    more = f" and {len(kinds) - _SHOWN} more sizes" if len(kinds) > _SHOWN else ""
    return (
        f"the rank is above the smaller dimension of {'; '.join(parts)}{more}: with a rank of that "
        "dimension such a layer can learn as much, and the adapter is smaller"
    )
