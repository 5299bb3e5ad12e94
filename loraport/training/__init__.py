"""Train LoRA adapters on any torch module.

>>> from loraport.training import LoraOptions, attach, detach, adapter_of, train
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from loraport.training.lora.inject import adapter_of, attach, detach, lora_layers
    from loraport.training.lora.load import load_into
    from loraport.training.losses.loss import LossSum
    from loraport.training.options import LoopOptions, LoraOptions, TrainOptions
    from loraport.training.run.loop import TrainingResult, train
    from loraport.training.text import TrainingSummary, train_language_model

# Name → module; imported when first used, since most of them import torch.
_HOMES = {
    "LoopOptions": "options",
    "LoraOptions": "options",
    "LossSum": "losses.loss",
    "TrainOptions": "options",
    "TrainingResult": "run.loop",
    "TrainingSummary": "text",
    "adapter_of": "lora.inject",
    "attach": "lora.inject",
    "detach": "lora.inject",
    "load_into": "lora.load",
    "lora_layers": "lora.inject",
    "train": "run.loop",
    "train_language_model": "text",
}

__all__ = [
    "LoopOptions",
    "LoraOptions",
    "LossSum",
    "TrainOptions",
    "TrainingResult",
    "TrainingSummary",
    "adapter_of",
    "attach",
    "detach",
    "load_into",
    "lora_layers",
    "train",
    "train_language_model",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
