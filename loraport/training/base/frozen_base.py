"""The base model as training needs it: in its precision, on its device."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from loraport.base.config import read_model_config
from loraport.base.finding import resolve_base
from loraport.base.loading import load_causal_lm
from loraport.errors import LoraportError
from loraport.training.base.quantized_base import Quantization, quantize_linears
from loraport.training.devices import Placement

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.modeling_layers import GradientCheckpointingLayer

QUANTIZED = ("nf4", "int8")


def load_base(
    base: str, placement: Placement, device: str, storage: str = "auto"
) -> PreTrainedModel:
    """Load a base in the precision that training keeps it in.

    Args:
        base: See `loraport.base.finding.resolve_base`.
        placement: Where and how to compute.
        device: Where to load it.
        storage: ``"float32"`` for exact weights in any case; others are narrowed by `narrow`.

    Raises:
        LoraportError: If it cannot be loaded.
    """
    dtype: torch.dtype = torch.float32
    if placement.dtype is torch.bfloat16 and storage != "float32":
        # Weights stored in bfloat16 stay so; others stay exact and autocast rounds them.
        config = read_model_config(resolve_base(base))
        stored = config.get("dtype") or config.get("torch_dtype")
        dtype = torch.bfloat16 if stored == "bfloat16" else torch.float32
    return load_causal_lm(base, dtype=dtype, device=device)


def narrow(model: nn.Module, storage: str, placement: Placement) -> None:
    """Round the weights of a loaded base to what they are stored in; the model stays so.

    Args:
        model: The base, without LoRA layers.
        storage: ``"bfloat16"``, ``"nf4"`` or ``"int8"``; others change nothing.
        placement: Where and how to compute.

    Raises:
        LoraportError: If bitsandbytes is needed and not installed.
    """
    if storage in QUANTIZED:
        quantize_linears(model, cast(Quantization, storage), placement.device, placement.dtype)
    if storage == "bfloat16" or (storage in QUANTIZED and placement.dtype is torch.bfloat16):
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.data = parameter.data.to(torch.bfloat16)


def checkpoint_activations(
    model: PreTrainedModel, layers: int | None = None, *, keep_random_state: bool = True
) -> None:
    """Compute activations again in the backward pass instead of keeping them.

    Args:
        model: Changed in place.
        layers: Only in so many of its layers, the first ones; ``None`` for all.
        keep_random_state: Drop out the same the second time.

    Raises:
        LoraportError: If the model does not support it, or has fewer layers.
    """
    if not model.supports_gradient_checkpointing:
        raise LoraportError(
            f"--gradient-checkpointing: expected a model that supports it, got "
            f"{type(model).__name__}"
        )
    # transformers renamed it; the older name warns where the newer one exists.
    newer = getattr(model, "activation_checkpointing_enable", None)
    enable = newer or model.gradient_checkpointing_enable
    enable({"use_reentrant": False, "preserve_rng_state": keep_random_state})
    if layers is None:
        return
    every = checkpointable_layers(model)
    if layers > len(every):
        raise LoraportError(
            f"--checkpointed-layers {layers}: expected at most {len(every)}, the layers of "
            f"{type(model).__name__} that can be computed again"
        )
    for layer in every[layers:]:
        layer.gradient_checkpointing = False


def checkpointable_layers(model: PreTrainedModel) -> list[GradientCheckpointingLayer]:
    """Return the layers of a model whose activations can be computed again."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    return [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
