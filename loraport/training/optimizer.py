"""The optimizer: AdamW, with a learning rate of its own for some parameters."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from loraport.training.options import LoopOptions

_FACTOR = "learning_rate_factor"


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], options: LoopOptions, device: torch.device
) -> torch.optim.Optimizer:
    """Return AdamW over parameters; with LoRA+, all but ``A`` learn at a higher rate.

    ``B`` starts at zero and its optimal step is larger than that of ``A`` by a factor that grows
    with the width of the model; one rate for both learns slowly (Hayou et al. 2024, LoRA+,
    arXiv:2402.12354). DoRA's magnitude goes with ``B``, as in PEFT.

    Args:
        parameters: Name → parameter; the last part of a name is ``lora_A``, ``lora_B``, ...
        options: Learning rate, its ratio, and weight decay.
        device: Where the parameters are.
    """
    slow = [p for name, p in parameters.items() if name.endswith(".lora_A")]
    fast = [p for name, p in parameters.items() if not name.endswith(".lora_A")]
    ratio = options.lora_plus_ratio
    groups = [{"params": list(parameters.values()), _FACTOR: 1.0}]
    if ratio != 1.0:
        groups = [{"params": slow, _FACTOR: 1.0}, {"params": fast, _FACTOR: ratio}]
    optimizer = torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=options.learning_rate,
        weight_decay=options.weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
    set_learning_rate(optimizer, options.learning_rate)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of ``A``; the others follow in their ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[_FACTOR]
