"""How a base stores a module's weight: ``[out, in]``, or transposed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from loraport.adapter import LoraModule, ModuleKind
from loraport.errors import LoraportError

if TYPE_CHECKING:
    import torch
    from torch import nn


def stores_in_out(module: nn.Module) -> bool:
    """Tell whether a module of a model stores its weight ``[in, out]``."""
    from torch import nn

    return isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"


def is_transposed(module: LoraModule, shape: Sequence[int]) -> bool:
    """Tell whether a base weight of this shape is stored as ``[in, out]``.

    Embeddings are (``[vocab, dim]``), and so is transformers' ``Conv1D``. The shape decides
    where it can: PEFT's ``fan_in_fan_out`` is one flag for a whole adapter and is wrong for one
    part of an adapter on both ``Conv1D`` and ``Linear``. Square weights rest on the flag.

    Args:
        module: The adapted module.
        shape: Shape of the base weight as stored.

    Raises:
        LoraportError: If the shape fits neither way.
    """
    out = int(module.lora_B.shape[0])
    rows = int(shape[0])
    if module.kind is ModuleKind.CONV:
        kernel = tuple(module.lora_A.shape[2:])
        channels = int(module.lora_A.shape[1])
        own = channels // module.groups
        if rows != out or tuple(shape[2:]) != kernel or (len(shape) > 1 and shape[1] != own):
            raise _misfit(f"[{out}, {own}, {', '.join(map(str, kernel))}]", shape)
        return False
    features = int(module.lora_A.shape[1])
    plain, turned = (out, features), (features, out)
    found = tuple(shape)
    if found not in (plain, turned):
        raise _misfit(f"[{out}, {features}], or that transposed", shape)
    if module.kind is ModuleKind.EMBEDDING:
        if found != turned:
            raise _misfit(f"[{features}, {out}]", shape)
        return True
    return module.fan_in_fan_out if plain == turned else found == turned


def stored_as_out_in(base_weight: torch.Tensor, module: LoraModule) -> torch.Tensor:
    """Return the base weight as float32 ``[out, in]``, whatever its storage.

    Raises:
        LoraportError: If its shape does not fit the adapter's.
    """
    weight = base_weight.float().flatten(1)
    return weight.T if is_transposed(module, tuple(base_weight.shape)) else weight


def _misfit(expected: str, shape: Sequence[int]) -> LoraportError:
    return LoraportError(
        f"base weight: expected {expected} as A and B ask for, got {list(shape)}; "
        "use the base the adapter was trained on"
    )
