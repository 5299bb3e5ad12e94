"""The losses of several candidates on one batch, each row of each candidate by itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from loraport.sweep.layers import CandidatesLayer
from loraport.training.data.batches import TokenBatch
from loraport.training.data.end_to_end import SegmentedBatch
from loraport.training.losses.language_model import HiddenStates, cross_entropy_at, logits_at
from loraport.training.losses.output_head import output_head


class RowLosses(NamedTuple):
    """Sums of losses by candidate and row.

    Attributes:
        totals: ``[count, rows]``, sums with a gradient; rows in the batch's order, also where
            several lie in one sequence.
        weights: How many losses each row sums; the same for every candidate.
        tokens: What throughput counts, of one candidate.
    """

    totals: torch.Tensor
    weights: tuple[int, ...]
    tokens: int


# From model, batch and number of candidates to their losses; it repeats the batch itself. Where
# passes are recorded it takes ``hidden``, as `grouped_language_model_loss` does.
GroupLoss = Callable[..., RowLosses]


def grouped_language_model_loss(
    model: nn.Module, batch: TokenBatch, count: int, hidden: HiddenStates | None = None
) -> RowLosses:
    """Return the summed cross entropy of each candidate on each row.

    Args:
        model: A causal language model whose rows are grouped by candidate.
        batch: One candidate's batch, ``[batch, length]``: rows padded, or end to end.
        count: Candidates.
        hidden: See `loraport.training.losses.language_model.language_model_loss`.
    """
    places, rows, counts = batch.learned()
    targets = batch.labels[:, 1:].flatten()[places].repeat(count)  # [count * n]
    repeated = repeat(batch, count)
    size = batch.labels[:, 1:].numel()
    firsts = torch.arange(0, count * size, size, device=places.device)
    positions = (firsts[:, None] + places).flatten()  # [count * n]
    if isinstance(output_head(model), CandidatesLayer):
        # A chunk of tokens would not hold the rows of every candidate.
        logits = logits_at(model, repeated, positions)  # [count * n, vocab]
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = F.cross_entropy(logits.to(wide), targets, reduction="none")
    else:
        losses = cross_entropy_at(model, repeated, positions, targets, "none", hidden)
    losses = losses.view(count, -1)
    totals = losses.new_zeros(count, len(counts)).index_add(1, rows, losses)
    return RowLosses(totals, counts, batch.row_tokens)


def repeat(batch: TokenBatch, count: int) -> TokenBatch:
    """Return a batch ``count`` times over, one after the other."""

    def times(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else tensor.repeat(count, 1)

    tokens, labels = batch.tokens.repeat(count, 1), batch.labels.repeat(count, 1)
    if isinstance(batch, SegmentedBatch):
        places, segments, bounds = times(batch.positions), times(batch.segments), batch.bounds
        if bounds is not None:
            firsts = batch.tokens.numel() * torch.arange(count, device=bounds.device)
            # Where one ends and the next begins is said twice: a row without tokens.
            bounds = (firsts[:, None] + bounds).flatten().to(bounds.dtype)
        return SegmentedBatch(
            tokens, None, labels, positions=places, segments=segments, bounds=bounds
        )
    return TokenBatch(tokens, times(batch.mask), labels)
