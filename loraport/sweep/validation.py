"""The loss of every candidate on every validation row."""

from __future__ import annotations

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
    try:
        with evaluation_mode(model), torch.no_grad(), placement.autocast():
            epoch = validation.epoch(0) if isinstance(validation, EpochBatches) else validation
            for batch in epoch:
                part = loss(model, to_device(batch, placement.device), count)
                totals.append(part.totals.double())
                weights += part.weights
    finally:
        rng.restore(before)
    if not totals:
        raise LoraportError("validation batches: expected some, got none")
    return torch.cat(totals, dim=1).tolist(), weights
