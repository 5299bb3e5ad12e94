"""Weights that torch computes from others in every pass: normed, or parametrized otherwise.

``torch.nn.utils.weight_norm`` and ``spectral_norm`` do it in a hook, the functions of
``torch.nn.utils.parametrizations`` in a property of a class of the module's own.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

_SOURCES = ("_g", "_v", "_u", "_orig")  # what the hooks' sources are called after the weight


def computed_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the weights that a module computes in every pass, as it does in evaluation mode."""
    found = {}
    with torch.no_grad():
        if parametrize.is_parametrized(module):
            for name, computed in module.parametrizations.items():  # type: ignore[union-attr, operator]
                found[name] = computed()
        for hook in module._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                found[hook.name] = hook.compute_weight(module)
            elif isinstance(hook, SpectralNorm):
                found[hook.name] = hook.compute_weight(module, do_power_iteration=False)
    return {name: tensor.detach() for name, tensor in found.items()}


def norms_by_iteration(module: nn.Module) -> bool:
    """Tell whether a module moves buffers that its weight depends on, in training mode."""
    hooks = module._forward_pre_hooks.values()
    return isinstance(module, _SpectralNorm) or any(isinstance(h, SpectralNorm) for h in hooks)


@contextmanager
def weights_stored(model: nn.Module) -> Iterator[None]:
    """Let a model in evaluation mode store the weights that it computes, for a while.

    So an export has them by their names, and not what they are computed from.
    """
    undo = []
    try:
        for module in model.modules():
            weights = computed_weights(module)
            if weights:
                undo.append((module, type(module), dict(module.__dict__)))
                _store(module, weights)
        yield
    finally:
        for module, own_class, contents in undo:
            module.__class__ = own_class
            module.__dict__.clear()
            module.__dict__.update(contents)


def _store(module: nn.Module, weights: Mapping[str, torch.Tensor]) -> None:
    """Let a module hold its weights, and nothing that they are computed from, in place."""
    for name in ("_parameters", "_buffers", "_modules", "_forward_pre_hooks"):
        module.__dict__[name] = copy.copy(module.__dict__[name])  # the module's own stays as it is
    if parametrize.is_parametrized(module):
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module._modules["parametrizations"]
    for number, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, WeightNorm | SpectralNorm):
            del module._forward_pre_hooks[number]
    for name, weight in weights.items():
        for suffix in _SOURCES:
            module._parameters.pop(f"{name}{suffix}", None)
            module._buffers.pop(f"{name}{suffix}", None)
        module.__dict__.pop(name, None)
        module._parameters[name] = nn.Parameter(weight, requires_grad=False)
