"""Trained tokens (PEFT's ``trainable_token_indices``) as low-rank updates.

Rows ``W_t`` of an embedding replaced by ``W'_t`` are an update of as many ranks as there are
tokens: ``A`` is one at each token's place, ``B`` holds ``W'_t - W_t``. On an output head that
shares the embedding's weight it is the other way round.
"""

from __future__ import annotations

import torch

from loraport.adapter import ModuleKind, Replacement
from loraport.update import LowRankUpdate


def token_update(replacement: Replacement, base: torch.Tensor, kind: ModuleKind) -> LowRankUpdate:
    """Return the update that replaces some rows of a weight.

    Args:
        replacement: Rows ``[n, dim]`` and their numbers.
        base: The weight, ``[vocab, dim]``.
        kind: Of the module: an embedding, or a linear head with ``vocab`` outputs.
    """
    rows = list(replacement.rows or ())
    moved = replacement.tensor.float() - base[rows].float()  # [n, dim]
    places = torch.zeros(len(rows), base.shape[0])  # [n, vocab]
    places[torch.arange(len(rows)), rows] = 1
    if kind is ModuleKind.EMBEDDING:
        return LowRankUpdate(a=places, b=moved.T, scaling=1.0)
    return LowRankUpdate(a=moved, b=places.T, scaling=1.0)


def rows_misfit(replacement: Replacement, base: torch.Tensor) -> str | None:
    """Return what rows would fit a weight ``[vocab, dim]``, or ``None`` if these do."""
    rows = replacement.rows or ()
    wanted = (len(rows), base.shape[1])
    if tuple(replacement.tensor.shape) != wanted:
        return f"rows {list(wanted)}"
    if any(not 0 <= row < base.shape[0] for row in rows):
        return f"tokens below {base.shape[0]}"
    return None
