"""The validation loss."""

from __future__ import annotations

import torch
from torch import nn

from loraport.errors import LoraportError
from loraport.training import rng
from loraport.training.devices import Placement, to_device
from loraport.training.distributed.processes import processes_now
from loraport.training.distributed.sharing import own_parts, unpacked
from loraport.training.distributed.stream import Batches
from loraport.training.losses.loss import LossFunction, as_sum
from loraport.training.modes import evaluation_mode


def mean_loss(
    model: nn.Module, batches: Batches, loss: LossFunction, placement: Placement
) -> float:
    """Return the mean loss over batches, in evaluation mode and without gradients.

    The random generators and the model's mode are left as they were. Several processes divide
    the batches between them, and all get the mean over all.

    Raises:
        LoraportError: If there are no batches.
    """
    before, processes = rng.capture(), processes_now()
    total, weight = 0.0, 0.0
    if processes.size > 1:
        # An order drawn from the global generators has to be the same for all who divide it.
        rng.restore(processes.from_first(lambda: before))
    try:
        with evaluation_mode(model), torch.no_grad(), placement.autocast():
            for entry in own_parts(batches, processes):
                batch, counts = unpacked(entry)
                part = as_sum(loss(model, to_device(batch, placement.device)))
                if counts:
                    total, weight = total + float(part.total.double()), weight + part.weight
    finally:
        rng.restore(before)
    total, weight = processes.sums(total, weight)
    if not weight:
        raise LoraportError("validation batches: expected some, got none")
    return total / weight
