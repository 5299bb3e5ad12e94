"""The optimizer: AdamW, its state in 32 or in 8 bits; some parameters have a rate of their own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from loraport.errors import LoraportError
from loraport.training.base.bitsandbytes_library import import_bitsandbytes, require_pageable
from loraport.training.lora.lora_layer import LoraLayer
from loraport.training.options import LoopOptions

_FACTOR = "learning_rate_factor"
_CODES = ("qmap1", "qmap2")  # what the 8 bits mean: the same in every state


def trained_parameters(
    model: nn.Module, layers: Mapping[str, LoraLayer]
) -> dict[str, nn.Parameter]:
    """Return what is trained: name → parameter.

    Args:
        model: A model with a frozen base.
        layers: Module path → its LoRA layer.

    Raises:
        LoraportError: If there is nothing, or the model has other trainable parameters.
    """
    if not layers:
        raise LoraportError("the model: expected LoRA layers, got none; call attach(model) first")
    parameters = {
        f"{path}.{name}": parameter
        for path, layer in layers.items()
        for name, parameter in layer.named_parameters(recurse=False)
        if parameter.requires_grad
    }
    wanted = {id(parameter) for parameter in parameters.values()}
    others = [
        name for name, p in model.named_parameters() if p.requires_grad and id(p) not in wanted
    ]
    if others or not parameters:
        raise LoraportError(
            "the model: expected trainable LoRA matrices and a frozen base, got "
            + (f"trainable {', '.join(others[:5])}" if others else "only fixed layers")
        )
    return parameters


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], options: LoopOptions, device: torch.device
) -> torch.optim.Optimizer:
    """Return AdamW over parameters; with LoRA+, all but ``A`` learn at a higher rate.

    ``B`` starts at zero and its optimal step is larger than that of ``A`` by a factor that grows
    with the width of the model; one rate for both learns slowly (Hayou et al. 2024, LoRA+,
    arXiv:2402.12354). DoRA's magnitude goes with ``B``, as in PEFT. Embeddings have the rates of
    any other layer, where PEFT gives both their matrices one of their own, 1e-6.

    Args:
        parameters: Name → parameter; the last part of a name is ``lora_A``, ``lora_B``, ...
        options: Learning rate, its ratio, weight decay, and what the state is kept in.
        device: Where the parameters are.

    Raises:
        LoraportError: If bitsandbytes is needed and not installed, or a GPU is needed.
    """
    slow = [p for name, p in parameters.items() if name.endswith(".lora_A")]
    fast = [p for name, p in parameters.items() if not name.endswith(".lora_A")]
    ratio = options.lora_plus_ratio
    groups = [{"params": list(parameters.values()), _FACTOR: 1.0}]
    if ratio != 1.0:
        groups = [{"params": slow, _FACTOR: 1.0}, {"params": fast, _FACTOR: ratio}]
    groups = [group for group in groups if group["params"]]
    rates: dict[str, Any] = {"lr": options.learning_rate, "weight_decay": options.weight_decay}
    optimizer: torch.optim.Optimizer
    if options.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, **rates, fused=device.type in ("cpu", "cuda"))
    else:
        optimizer = _in_8_bits(options.optimizer, groups, rates, device)
    set_learning_rate(optimizer, options.learning_rate)
    return optimizer


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of ``A``; the others follow in their ratio."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group[_FACTOR]


def step_where_finite(optimizer: torch.optim.Optimizer, figures: torch.Tensor) -> None:
    """Take a step if all of some figures are finite, which the device alone looks at.

    So a GPU has its next work before the host has read the last step's.

    Args:
        optimizer: Fused, of torch's own.
        figures: Any floating-point tensor on the parameters' device.
    """
    # What `torch.amp.GradScaler` tells fused optimizers, where a step must not be taken.
    optimizer.found_inf = (~figures.isfinite().all()).float()  # type: ignore[attr-defined]
    try:
        optimizer.step()
    finally:
        del optimizer.found_inf  # type: ignore[attr-defined]


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]
) -> dict[str, dict[str, torch.Tensor]]:
    """Return the optimizer's state by parameter name."""
    return {
        name: {
            key: value if isinstance(value, torch.Tensor) else torch.tensor(value)
            for key, value in optimizer.state[parameter].items()
            if key not in _CODES
        }
        for name, parameter in parameters.items()
        if parameter in optimizer.state
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, nn.Parameter],
    tensors: Mapping[str, Mapping[str, torch.Tensor]],
) -> None:
    """Put the optimizer's state back; the inverse of `optimizer_tensors`."""
    if isinstance(optimizer, torch.optim.AdamW):
        for name, entries in tensors.items():
            device = parameters[name].device
            optimizer.state[parameters[name]] = {
                key: tensor.to(device) for key, tensor in entries.items()
            }
        return
    names = {id(parameter): name for name, parameter in parameters.items()}
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            entries = tensors.get(names[id(parameter)], {})
            if not entries:
                continue
            # It allocates its own state: paged, where that is asked for.
            optimizer.init_state(group, parameter, group_index, index)  # type: ignore[attr-defined]
            state = optimizer.state[parameter]
            for key, tensor in entries.items():
                if isinstance(state[key], torch.Tensor):
                    state[key].copy_(tensor)
                else:
                    state[key] = int(tensor)


def _in_8_bits(
    name: str, groups: list[dict[str, Any]], rates: Mapping[str, Any], device: torch.device
) -> torch.optim.Optimizer:
    """Return bitsandbytes' AdamW (Dettmers et al. 2022, arXiv:2110.02861).

    Moments of parameters with fewer than 4096 numbers stay in float32.
    """
    library = import_bitsandbytes(f"--optimizer {name}")
    require_pageable(name, device)
    made: type[torch.optim.Optimizer] = (
        library.optim.PagedAdamW8bit if name == "paged-adamw-8bit" else library.optim.AdamW8bit
    )
    return made(groups, **rates)
