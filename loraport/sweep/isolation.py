"""Prove on the model itself that its rows do not mix, before candidates share a batch."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from loraport.errors import LoraportError
from loraport.sweep.layers import Attached
from loraport.sweep.loss import GroupLoss
from loraport.training.devices import Placement
from loraport.training.modes import evaluation_mode


class RowsMixedError(LoraportError):
    """A model's rows depend on each other: its candidates have to train one by one."""


# Far above what rounding does to a row's loss, far below what the change does.
_TOLERANCE = 1e-3
_STRENGTH = 0.1

# Model → module paths whose layers keep rows apart.
_proved: weakref.WeakKeyDictionary[nn.Module, set[frozenset[str]]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def require_rows_apart(
    attached: Attached, batch: Any, loss: GroupLoss, placement: Placement
) -> None:
    """Change one candidate and see that the losses of another stay as they were.

    A model that mixes the rows of a batch, or passes them to its layers in another order, cannot
    hold several candidates in a batch. What was proved is remembered with the model.

    Args:
        attached: The model; left as it was, with nobody present.
        batch: One candidate's batch, on the device.
        loss: Gives the losses by candidate.
        placement: Where and how to compute.

    Raises:
        RowsMixedError: If the rows mix.
    """
    names = list(attached.members)
    adapted = frozenset(path for layers in attached.members.values() for path in layers)
    proved = _proved.setdefault(attached.model, set())
    if len(names) < 2 or adapted in proved:
        return
    # The changed one's rows come first, the other's after them.
    changed = max(names, key=lambda name: len(attached.members[name]))
    other = next(name for name in names if name != changed)
    parameters = [layer.lora_B for layer in attached.members[changed].values()]
    kept = [parameter.detach().clone() for parameter in parameters]
    try:
        with evaluation_mode(attached.model), placement.autocast():
            # First the base alone: what is measured once of a model runs on rows of its own.
            attached.set_present(())
            loss(attached.model, batch, 1)
            attached.set_present((changed, other))
            before = loss(attached.model, batch, 2).totals.double()
            generator = torch.Generator().manual_seed(0)
            for parameter in parameters:
                drawn = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(drawn * _STRENGTH)
            after = loss(attached.model, batch, 2).totals.double()
    finally:
        for parameter, was in zip(parameters, kept, strict=True):
            parameter.copy_(was)
        attached.set_present(())
    limit = _TOLERANCE * (1 + before[1].abs())
    if not bool(((after[1] - before[1]).abs() <= limit).all()):
        raise RowsMixedError(
            "the model: expected rows that do not depend on each other, got one that mixes them; "
            "its candidates have to train one by one: --together 1"
        )
    proved.add(adapted)
