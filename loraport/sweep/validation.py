"""The loss of every candidate on every validation row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from loraport.errors import LoraportError
from loraport.sweep.loss import GroupLoss
from loraport.training import rng
from loraport.training.devices import Placement, to_device
from loraport.training.distributed.stream import Batches, EpochBatches
from loraport.training.modes import evaluation_mode


def row_losses(
    model: nn.Module, validation: Batches, loss: GroupLoss, placement: Placement, count: int
) -> tuple[list[list[float]], list[int]]:
    """Return the summed loss of each candidate on each row, and how many losses each row sums.

    Batches' rows of one line of the data, a chat that is divided, are one row here: what is hard
    in one of its answers is in the next, so they are no measurements of their own.

    The random generators and the model's mode are left as they were.

    Args:
        model: Its rows are grouped by candidate.
        validation: Each is one candidate's batch.
        loss: Gives each candidate's losses on a batch.
        placement: Where and how to compute.
        count: Candidates present.

    Raises:
        LoraportError: If there are no batches.
    """
    before = rng.capture()
    totals: list[torch.Tensor] = []
    weights: list[int] = []
    lines: list[int] = []
    try:
        with evaluation_mode(model), torch.no_grad(), placement.autocast():
            epoch = validation.epoch(0) if isinstance(validation, EpochBatches) else validation
            for batch in epoch:
                part = loss(model, to_device(batch, placement.device), count)
                totals.append(part.totals.double())
                weights += part.weights
                known = getattr(batch, "lines", ())
                lines += known if len(known) == len(part.weights) else [0] * len(part.weights)
    finally:
        rng.restore(before)
    if not totals:
        raise LoraportError("validation batches: expected some, got none")
    return _by_line(torch.cat(totals, dim=1), weights, lines)


def _by_line(
    totals: torch.Tensor, weights: Sequence[int], lines: Sequence[int]
) -> tuple[list[list[float]], list[int]]:
    """Sum what is of one line of the data; rows of an unknown one, 0, stay by themselves.

    >>> _by_line(torch.tensor([[1.0, 2.0, 4.0, 8.0]]), [1, 1, 1, 5], [7, 0, 7, 0])
    ([[5.0, 2.0, 8.0]], [2, 1, 5])
    """
    numbers: dict[tuple[int, int], int] = {}
    owners = [
        numbers.setdefault((line, 0) if line else (0, index), len(numbers))
        for index, line in enumerate(lines)
    ]
    summed = [0] * len(numbers)
    for owner, weight in zip(owners, weights, strict=True):
        summed[owner] += weight
    places = torch.tensor(owners, device=totals.device)
    sums = totals.new_zeros(len(totals), len(numbers)).index_add(1, places, totals)
    return sums.tolist(), summed
