"""Spread a frozen base over the processes of a run (FSDP2), so that each keeps a part of it.

The base's weights are gathered block by block when they are needed and dropped again. The LoRA
matrices are left out of it: every process has them whole, and `Processes.sum_gradients` keeps them
alike. Source: ``torch.distributed.fsdp.fully_shard``.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import nn

from loraport.errors import LoraportError
from loraport.training.lora.lora_layer import LoraLayer


def shard_base(model: nn.Module, layers: Iterable[LoraLayer], device: torch.device) -> None:
    """Spread all parameters but the LoRA matrices over the processes; the model stays so.

    Args:
        model: A model with LoRA layers, the same on every process; on the CPU it takes up no
            more of the device than its largest block and its own share.
        layers: Its LoRA layers.
        device: Where the model is to compute.

    Raises:
        LoraportError: If the base is quantized.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    kept = {p for layer in layers for p in layer.parameters(recurse=False)}
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            raise LoraportError(
                f"{name}: expected floating-point weights to spread over the processes, got "
                f"{parameter.dtype}; leave out --shard-base, or the quantization"
            )
    for parameter in kept:
        parameter.data = parameter.data.to(device)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for block in repeated_blocks(model):
        if any(parameter not in kept for parameter in block.parameters()):
            fully_shard(block, mesh=mesh, ignored_params=kept)
    fully_shard(model, mesh=mesh, ignored_params=kept)


def repeated_blocks(model: nn.Module) -> list[nn.Module]:
    """Return the outermost modules that are numbered: the layers of a transformer.

    >>> block = nn.Sequential(nn.Linear(2, 2))
    >>> model = nn.ModuleDict({"layers": nn.ModuleList([block]), "head": nn.Linear(2, 2)})
    >>> [found is block for found in repeated_blocks(model)]
    [True]
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if path.rpartition(".")[2].isdigit() and not inside:
            found[path] = module
    return list(found.values())
