"""Norms that multiply by ``1 + weight`` (Gemma's, Nemotron's): exporters store the sum."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress

import torch
from torch import nn

from loraport.naming import weight_name


@torch.no_grad()
def gains_plus_one(module: nn.Module) -> Iterator[str]:
    """Yield the weights of a model's norms that scale by one more than they are.

    They are told by what the norm does with a weight and a bias of zeros.
    """
    for path, norm in module.named_modules():
        weight = norm._parameters.get("weight")
        if weight is None or weight.dim() != 1 or not _is_norm(norm):
            continue
        x = torch.linspace(1, 2, len(weight), dtype=weight.dtype, device=weight.device)
        nothing = {name: torch.zeros_like(own) for name, own in norm.named_parameters()}
        with suppress(TypeError, AttributeError, RuntimeError):  # it may take more than one tensor
            if bool(torch.func.functional_call(norm, nothing, (x[None],)).any()):
                yield weight_name(path)


def _is_norm(module: nn.Module) -> bool:
    return any(kind in type(module).__name__ for kind in ("RMSNorm", "LayerNorm"))
