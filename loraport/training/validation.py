"""The validation loss."""

from __future__ import annotations

import torch
from torch import nn

from loraport.errors import LoraportError
from loraport.training import rng
from loraport.training.devices import Placement, to_device
from loraport.training.loss import LossFunction, as_sum
from loraport.training.modes import evaluation_mode
from loraport.training.stream import Batches, EpochBatches


def mean_loss(
    model: nn.Module, batches: Batches, loss: LossFunction, placement: Placement
) -> float:
    """Return the mean loss over batches, in evaluation mode and without gradients.

    The random generators and the model's mode are left as they were.

    Raises:
        LoraportError: If there are no batches.
    """
    before = rng.capture()
    total, weight = 0.0, 0.0
    try:
        with evaluation_mode(model), torch.no_grad(), placement.autocast():
            for batch in batches.epoch(0) if isinstance(batches, EpochBatches) else batches:
                part = as_sum(loss(model, to_device(batch, placement.device)))
                total, weight = total + float(part.total.double()), weight + part.weight
    finally:
        rng.restore(before)
    if not weight:
        raise LoraportError("validation batches: expected some, got none")
    return total / weight
