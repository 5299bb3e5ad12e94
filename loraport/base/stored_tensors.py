"""What a PyTorch model stores: its parameters, and buffers such as running statistics."""

from __future__ import annotations

import torch
from torch import nn

from loraport.base.computed_weights import computed_weights


def stored_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return a model's parameters and the buffers of floats that a checkpoint stores, by path.

    What several modules share stands under every path.
    """
    found: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    for path, module in model.named_modules(remove_duplicate=False):
        for name, buffer in module._buffers.items():
            passing = name in module._non_persistent_buffers_set
            if buffer is not None and buffer.is_floating_point() and not passing:
                found[f"{path}.{name}" if path else name] = buffer
    return found


def stored_tensor(model: nn.Module, name: str) -> torch.Tensor:
    """Return a parameter or a buffer by its path, or a weight that is computed in every pass.

    Raises:
        AttributeError: If the model has none of this name.
    """
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    for tensors in (module._parameters, module._buffers):
        found = tensors.get(leaf)
        if found is not None:
            return found
    if (computed := computed_weights(module).get(leaf)) is not None:
        return computed
    raise AttributeError(f"{type(module).__name__} has neither a parameter nor a buffer {leaf!r}")
