"""The linear modules of a PyTorch model, as slots see them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn


@dataclass(frozen=True, eq=False)
class LinearModule:
    """A linear module of the base.

    Attributes:
        path: Its path in the model.
        weight: Its weight as a view ``[out, in]``, whatever its storage.
    """

    path: str
    weight: torch.Tensor

    @property
    def in_features(self) -> int:
        """Length of its input."""
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        """Length of its output."""
        return int(self.weight.shape[0])


def linear_modules(model: nn.Module) -> dict[str, LinearModule]:
    """Return every ``nn.Linear`` and transformers ``Conv1D`` by path, in the model's order."""
    from transformers.pytorch_utils import Conv1D

    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[path] = LinearModule(path, module.weight.detach())
        elif isinstance(module, Conv1D):
            found[path] = LinearModule(path, module.weight.detach().T)
    return found
