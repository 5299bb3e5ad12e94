"""The modules of a PyTorch model that slots can serve."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from loraport.adapter import ModuleKind


@dataclass(frozen=True, eq=False)
class SlottableModule:
    """A linear module, embedding or convolution of the base.

    Attributes:
        path: Its path in the model.
        weight: Its weight as a view ``[out, in]``, whatever its storage: an embedding is a
            linear map of the one-hot token, a kernel is flattened to
            ``in = channels / groups * kernel``.
        kind: What it is.
    """

    path: str
    weight: torch.Tensor
    kind: ModuleKind = ModuleKind.LINEAR

    @property
    def in_features(self) -> int:
        """Columns of its weight."""
        return int(self.weight.shape[1])

    @property
    def out_features(self) -> int:
        """Length of its output."""
        return int(self.weight.shape[0])


def slottable_modules(model: nn.Module) -> dict[str, SlottableModule]:
    """Return every module that a slot can serve by path, in the model's order.

    These are ``nn.Linear``, transformers' ``Conv1D``, ``nn.Embedding``, ``nn.Conv1d`` and
    ``nn.Conv2d``.
    """
    from transformers.pytorch_utils import Conv1D

    found = {}
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear):
            found[path] = SlottableModule(path, module.weight.detach())
        elif isinstance(module, Conv1D):
            found[path] = SlottableModule(path, module.weight.detach().T)
        elif isinstance(module, nn.Embedding):
            weight = module.weight.detach().T
            found[path] = SlottableModule(path, weight, ModuleKind.EMBEDDING)
        elif isinstance(module, nn.Conv1d | nn.Conv2d):
            weight = module.weight.detach().flatten(1)
            found[path] = SlottableModule(path, weight, ModuleKind.CONV)
    return found


def linear_modules(model: nn.Module) -> dict[str, SlottableModule]:
    """Return every ``nn.Linear`` and transformers ``Conv1D`` by path, in the model's order."""
    return {
        path: module
        for path, module in slottable_modules(model).items()
        if module.kind is ModuleKind.LINEAR
    }


def tied_modules(modules: Mapping[str, SlottableModule]) -> tuple[tuple[str, ...], ...]:
    """Return groups of modules that share one weight: an embedding and its output head."""
    groups: dict[int, list[str]] = {}
    for path, module in modules.items():
        groups.setdefault(module.weight.data_ptr(), []).append(path)
    return tuple(tuple(paths) for paths in groups.values() if len(paths) > 1)
