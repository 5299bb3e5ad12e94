"""The modules of a PyTorch model that slots can serve."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from loraport.adapter import ModuleKind
from loraport.base.own_outputs import gives_outputs
from loraport.base.storage import stores_in_out

if TYPE_CHECKING:
    from loraport.base.checkpoint import Checkpoint

_MATRIX = 2  # dimensions


@dataclass(frozen=True, eq=False)
class SlottableModule:
    """A linear module, embedding or convolution of the base.

    Its weight counts as ``[out, in]``, whatever its storage: an embedding is a linear map of the
    one-hot token, a kernel is flattened to ``in = channels / groups * kernel``.

    Attributes:
        path: Its path in the model.
        out_features: Length of its output.
        in_features: Columns of its weight.
        kind: What it is.
        rows: Gives some rows of its weight, from one number up to another.
        stored: The same for modules that share one weight, and for no others.
    """

    path: str
    out_features: int
    in_features: int
    kind: ModuleKind
    rows: Callable[[int, int], torch.Tensor]
    stored: Hashable

    @property
    def weight(self) -> torch.Tensor:
        """Its weight ``[out, in]``, a view where the model is loaded."""
        return self.rows(0, self.out_features)


def slottable_modules(model: nn.Module) -> dict[str, SlottableModule]:
    """Return every module that a slot can serve by path, in the model's order.

    These are ``nn.Linear``, transformers' ``Conv1D``, ``nn.Embedding``, ``nn.Conv1d``,
    ``nn.Conv2d`` and ``nn.Conv3d``, without those of `unfit_modules`.
    """
    return {path: _loaded(path, module, kind) for path, module, kind in _weighted(model)}


def unfit_modules(model: nn.Module) -> dict[str, str]:
    """Return, by path, why linear layers by name alone have no slot: they give no ``[..., out]``.

    Phi-MoE's routers give what experts take: an adapter beside one has no output to act on.
    """
    return {
        path: f"a {type(module).__name__}, which does not give what a linear layer gives"
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and not gives_outputs(module)
    }


def stored_modules(
    model: nn.Module, tensors: Mapping[str, str], checkpoint: Checkpoint
) -> dict[str, SlottableModule]:
    """Return the same of a model whose weights are in a checkpoint, and are read when asked for.

    Args:
        model: The model, on the meta device.
        tensors: Module path → the tensor that is its weight, of the same shape.
        checkpoint: Where they are.
    """
    return {
        path: _stored(path, module, kind, tensors[path], checkpoint)
        for path, module, kind in _weighted(model)
        if path in tensors
    }


def _weighted(model: nn.Module) -> Iterator[tuple[str, nn.Module, ModuleKind]]:
    from transformers.pytorch_utils import Conv1D

    unfit = unfit_modules(model)
    for path, module in model.named_modules():
        if path in unfit:
            continue
        if isinstance(module, nn.Linear | Conv1D):
            yield path, module, ModuleKind.LINEAR
        elif isinstance(module, nn.Embedding):
            yield path, module, ModuleKind.EMBEDDING
        elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
            yield path, module, ModuleKind.CONV


def _out_in(module: nn.Module) -> torch.Tensor:
    weight = module.weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().T if stores_in_out(module) else weight.detach().flatten(1)


def _loaded(path: str, module: nn.Module, kind: ModuleKind) -> SlottableModule:
    weight = _out_in(module)
    rows, columns = weight.shape
    return SlottableModule(
        path, rows, columns, kind, lambda start, stop: weight[start:stop], weight.data_ptr()
    )


def _stored(
    path: str, module: nn.Module, kind: ModuleKind, tensor: str, checkpoint: Checkpoint
) -> SlottableModule:
    out_features, in_features = _out_in(module).shape
    turned = stores_in_out(module)

    def rows(start: int, stop: int) -> torch.Tensor:
        part = slice(start, stop)
        if turned:
            return checkpoint.load_part(tensor, slice(None), part).T
        return checkpoint.load_part(tensor, part).flatten(1)

    return SlottableModule(path, out_features, in_features, kind, rows, tensor)


def linear_modules(model: nn.Module) -> dict[str, SlottableModule]:
    """Return every ``nn.Linear`` and transformers ``Conv1D`` by path, in the model's order."""
    return {
        path: module
        for path, module in slottable_modules(model).items()
        if module.kind is ModuleKind.LINEAR
    }


def other_matrices(model: nn.Module) -> dict[str, SlottableModule]:
    """Return, by path, the modules of other kinds whose weight is a matrix ``[out, in]``: routers.

    No slot serves them, and quantizers round the products with them all the same.
    """
    served = {path for path, _, _ in _weighted(model)}
    return {
        path: _loaded(path, module, ModuleKind.LINEAR)
        for path, module in model.named_modules()
        if path not in served
        and (weight := module._parameters.get("weight")) is not None
        and weight.dim() == _MATRIX
    }


def tied_modules(modules: Mapping[str, SlottableModule]) -> tuple[tuple[str, ...], ...]:
    """Return groups of modules that share one weight: an embedding and its output head."""
    groups: dict[Hashable, list[str]] = {}
    for path, module in modules.items():
        groups.setdefault(module.stored, []).append(path)
    return tuple(tuple(paths) for paths in groups.values() if len(paths) > 1)
