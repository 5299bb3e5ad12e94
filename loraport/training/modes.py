"""Training and evaluation mode, left as they were found."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from loraport.base.computed_weights import norms_by_iteration


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into training mode, but for what would change the frozen base.

    Layers with running statistics (batch normalisation), and what norms a weight by vectors that it
    iterates (spectral norm), stay in evaluation mode.
    """
    with _restored(model):
        model.train()
        for module in model.modules():
            # Looked up in the module's own buffers: a LoRA layer answers for its base.
            if module._buffers.get("running_mean") is not None or norms_by_iteration(module):
                module.training = False
        yield


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode."""
    with _restored(model):
        model.eval()
        yield


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
