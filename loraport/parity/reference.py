"""The PyTorch side of a comparison, written apart from the training layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from loraport.adapter import Adapter
from loraport.errors import LoraportError, Problems
from loraport.update import LowRankUpdate, weighted_sum

Updates = Mapping[str, LowRankUpdate]


def updates_of(parts: Sequence[tuple[Adapter, float]], model: nn.Module) -> Updates:
    """Return the weighted sum of adapters as one update per module.

    Args:
        parts: Adapter and strength.
        model: The base, for variants whose update depends on its weights.

    Raises:
        LoraportError: Naming every module whose update does not fit the base's weight.
    """
    problems = Problems()
    found: dict[str, list[tuple[LowRankUpdate, float]]] = {}
    for adapter, strength in parts:
        for path, module in adapter.modules.items():
            weight = _weight(model, path)
            update = module.lower(weight)
            shape, stored = (update.b.shape[0], update.a.shape[1]), tuple(weight.flatten(1).shape)
            if stored not in (shape, shape[::-1]):
                problems.add(path, f"an update of a weight {list(stored)}", f"{list(shape)}")
            found.setdefault(path, []).append((update, strength))
    problems.raise_if_any("the adapter does not fit the base")
    return {path: weighted_sum(terms) for path, terms in found.items()}


def torch_outputs(model: nn.Module, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run the model and return its output tensors in order, without caches.

    Args:
        model: In evaluation mode.
        inputs: Arguments of ``forward`` by name.
    """
    device = next(model.parameters()).device
    tensors = {name: torch.from_numpy(array).to(device) for name, array in inputs.items()}
    with torch.no_grad():
        result = model(**tensors)
    return [tensor.float().cpu().numpy() for tensor in _tensors(result)]


@contextlib.contextmanager
def adapted(model: nn.Module, updates: Updates) -> Iterator[None]:
    """Run the model with updates beside its linear layers: ``y + scaling * B (A x)``."""
    handles = []
    for path, update in updates.items():
        module = model.get_submodule(path)
        handles.append(module.register_forward_hook(_hook(update, getattr(module, "bias", None))))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def merged(model: nn.Module, updates: Updates) -> Iterator[None]:
    """Run the model with updates added to its weights; the weights are put back afterwards."""
    kept: dict[str, torch.Tensor] = {}
    problems = Problems()
    try:
        for path, update in updates.items():
            weight = _weight(model, path)
            delta = update.delta(torch.float64).to(weight.device)
            if update.bias is not None or update.gain is not None:
                problems.add(path, "a plain low-rank update", "one with a gain or a bias")
                continue
            if weight.shape != delta.shape:
                delta = delta.T
            kept[path] = weight.detach().clone()
            with torch.no_grad():
                weight.copy_((weight.double() + delta).to(weight.dtype))
        problems.raise_if_any("torch reference")
        yield
    finally:
        for path, original in kept.items():
            with torch.no_grad():
                _weight(model, path).copy_(original)


def greedy_tokens(model: nn.Module, token_ids: Sequence[int], count: int) -> list[int]:
    """Return the next ``count`` tokens, each the likeliest, computed without a cache."""
    ids = list(token_ids)
    for _ in range(count):
        array = np.array([ids], np.int64)
        logits = torch_outputs(model, {"input_ids": array, "attention_mask": np.ones_like(array)})
        ids.append(int(logits[0][0, -1].argmax()))
    return ids[len(token_ids) :]


def _hook(update: LowRankUpdate, base_bias: torch.Tensor | None) -> Callable[..., torch.Tensor]:
    def add(module: nn.Module, arguments: tuple[torch.Tensor, ...], y: torch.Tensor) -> Any:
        del module
        x = arguments[0].float()  # [..., in]
        a, b = update.a.to(x), update.b.to(x)
        delta = (x @ a.T) @ b.T * update.scaling  # [..., out]
        if update.gain is None:
            result = y + delta
        else:
            bias = base_bias if base_bias is not None else torch.zeros_like(y[..., :1])
            result = update.gain.to(x) * (y - bias + delta) + bias
        return result if update.bias is None else result + update.bias.to(x)

    return add


def _weight(model: nn.Module, path: str) -> torch.Tensor:
    try:
        weight = model.get_submodule(path).weight
    except AttributeError as error:
        raise LoraportError(f"{path}: expected this module in the base, got none") from error
    assert isinstance(weight, torch.Tensor)
    return weight


def _tensors(result: Any) -> list[torch.Tensor]:
    """Return the floating tensors of a model's result in order, caches left out."""
    if isinstance(result, torch.Tensor):
        return [result]
    if hasattr(result, "items"):
        result = [value for key, value in result.items() if key != "past_key_values"]
    return [value for value in result if isinstance(value, torch.Tensor)]
