"""Linear layers by name alone, which give something else than a linear layer does."""

from __future__ import annotations

import torch
from torch import nn


def gives_outputs(module: nn.Linear) -> bool:
    """Tell whether a kind of linear layer gives ``[..., out]`` for ``[..., in]``; routers do not.

    Quantized weights, which may not compute where they are, are taken as they come.
    """
    if type(module).forward is nn.Linear.forward or not module.weight.is_floating_point():
        return True
    with torch.no_grad():
        try:
            output = module(module.weight.new_zeros(1, module.in_features))
        except (TypeError, ValueError, RuntimeError, IndexError):
            return False
    return isinstance(output, torch.Tensor) and output.shape == (1, module.out_features)
