"""Find a language model's output head, and measure what the model does to its result."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from loraport.training.losses.chunked_loss import LogitTransform
from loraport.training.modes import evaluation_mode

# Small values show the slope, the large one the bound.
_PROBE = (-30.0, -2.0, -0.5, 0.0, 1e-4, 0.5, 3.0, 30.0, 1e6)
_SLOPE_AT, _BOUND_AT = 4, 8
_TOLERANCE = 1e-4  # of float32 functions that a few operations compute

_measured: weakref.WeakKeyDictionary[nn.Module, LogitTransform | None] = weakref.WeakKeyDictionary()


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the module that makes logits of hidden states, where the model names one."""
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    return head if isinstance(head, nn.Module) else None


def logit_transform(model: nn.Module, head: nn.Module) -> LogitTransform | None:
    """Return what a model does to its head's result; ``None`` if that is something unknown.

    It is measured, not looked up by the name of the architecture: the model runs once on two
    tokens with known numbers in place of the head's result. The answer is remembered.

    Args:
        model: A transformers causal language model.
        head: Its output head.
    """
    if model not in _measured:
        _measured[model] = _measure(model, head)
    return _measured[model]


def assume_transform(model: nn.Module, transform: LogitTransform) -> None:
    """Tell what a model does to its head's result, where it has no weights to measure it with."""
    _measured[model] = transform


def _measure(model: nn.Module, head: nn.Module) -> LogitTransform | None:
    known: torch.Tensor | None = None

    def replace(_: nn.Module, __: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        nonlocal known
        values = torch.tensor(_PROBE, device=output.device)  # float32 whatever the model's
        known = torch.zeros(output.shape, device=output.device)
        known[..., : len(_PROBE)] = values[: output.shape[-1]]
        return known

    device = next(model.parameters()).device
    hook = head.register_forward_hook(replace)
    try:
        with evaluation_mode(model), torch.no_grad(), torch.autocast(device.type, enabled=False):
            tokens = torch.zeros((1, 2), dtype=torch.int64, device=device)
            logits = model(input_ids=tokens, use_cache=False).logits
    finally:
        hook.remove()
    if known is None or logits.shape != known.shape or known.shape[-1] < len(_PROBE):
        return None
    seen = logits[0, 0, : len(_PROBE)].double().tolist()
    scale = seen[_SLOPE_AT] / _PROBE[_SLOPE_AT]
    bounded = seen[_BOUND_AT] < 0.5 * scale * _PROBE[_BOUND_AT]
    # What was measured is rounded: to the digits that a configuration would have.
    transform = LogitTransform(
        scale=_rounded(scale), softcap=_rounded(seen[_BOUND_AT]) if bounded else None
    )
    expected = transform(torch.tensor(_PROBE, dtype=torch.float64))
    difference = (torch.tensor(seen, dtype=torch.float64) - expected).abs()
    agrees = bool((difference <= _TOLERANCE * expected.abs() + 1e-6).all())
    return transform if agrees and scale > 0 else None


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")
