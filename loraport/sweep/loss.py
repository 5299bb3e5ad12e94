"""The losses of several candidates on one batch, each row of each candidate by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from loraport.sweep.layers import CandidatesLayer
from loraport.training.batches import IGNORED, TokenBatch
from loraport.training.language_model import cross_entropy_at, logits_at
from loraport.training.output_head import output_head


class RowLosses(NamedTuple):
    """Sums of losses by candidate and row.

    Attributes:
        totals: ``[count, rows]``, sums with a gradient.
        weights: ``[rows]``, how many losses each sums; the same for every candidate.
        tokens: What throughput counts, of one candidate.
    """

    totals: torch.Tensor
    weights: torch.Tensor
    tokens: int


# From model, batch and number of candidates to their losses; it repeats the batch itself.
GroupLoss = Callable[[nn.Module, Any, int], RowLosses]


def grouped_language_model_loss(model: nn.Module, batch: TokenBatch, count: int) -> RowLosses:
    """Return the summed cross entropy of each candidate on each row.

    Args:
        model: A causal language model whose rows are grouped by candidate.
        batch: One candidate's batch, ``[rows, length]``.
        count: Candidates.
    """
    labels = batch.labels[:, 1:]  # [rows, length - 1]
    counted = labels != IGNORED
    targets = labels[counted].repeat(count)  # [count * n]
    repeated = repeat(batch, count)
    positions = counted.flatten().repeat(count).nonzero().flatten()  # [count * n]
    if isinstance(output_head(model), CandidatesLayer):
        # A chunk of tokens would not hold the rows of every candidate.
        logits = logits_at(model, repeated, positions)  # [count * n, vocab]
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = F.cross_entropy(logits.to(wide), targets, reduction="none")
    else:
        losses = cross_entropy_at(model, repeated, positions, targets, "none")
    losses = losses.view(count, -1)
    row = counted.nonzero()[:, 0]  # [n]
    totals = losses.new_zeros(count, len(labels)).index_add(1, row, losses)
    return RowLosses(totals, counted.sum(dim=1), batch.tokens.numel())


def repeat(batch: TokenBatch, count: int) -> TokenBatch:
    """Return a batch ``count`` times over, one after the other."""
    mask = None if batch.mask is None else batch.mask.repeat(count, 1)
    return TokenBatch(batch.tokens.repeat(count, 1), mask, batch.labels.repeat(count, 1))
