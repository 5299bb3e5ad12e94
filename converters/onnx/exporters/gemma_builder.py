"""Decoders like Gemma, for GenAI's builder.

What version 0.18 makes of these by itself is not quite the model:

1. it adds the one by which norms multiply more than by their weights in the checkpoint's own type:
   in bfloat16, in which Gemma is published, sums are off by up to 0.4 %;
2. it rounds what embeddings are multiplied by, ``sqrt(hidden_size)``, to two decimals;
3. it does not find Gemma 3's rotations, see `flat_rotations`.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from converters.onnx.exporters.flat_rotations import flatten
from converters.onnx.modules.gains_plus_one import gains_plus_one


def widen_gains(model: nn.Module) -> None:
    """Hold the norms that multiply by one more than their weights in float32, in place."""
    for weight in list(gains_plus_one(model)):
        model.get_submodule(weight.rpartition(".")[0]).float()


def mend(builders: Any) -> None:
    """Let the builder make of decoders like Gemma what they are.

    Args:
        builders: The builder's module of that name; changed in place.
    """
    _read_rotations()
    _add_ones_exactly(builders.Model)
    _scale_exactly(builders.GemmaModel)


def _read_rotations() -> None:
    from transformers import AutoConfig

    load = AutoConfig.from_pretrained

    def loaded(*arguments: Any, **named: Any) -> Any:
        found = load(*arguments, **named)
        # A model that is loaded asks for what it does not use, too: it needs its own.
        return found if isinstance(found, tuple) else flatten(found)

    AutoConfig.from_pretrained = loaded


def _add_ones_exactly(builder: Any) -> None:
    load = builder.load_weights

    def loaded(self: Any, *arguments: Any) -> Any:
        model = load(self, *arguments)
        if isinstance(model, nn.Module):
            widen_gains(model)
        return model

    builder.load_weights = loaded


def _scale_exactly(builder: Any) -> None:
    begin = builder.__init__

    def begun(self: Any, *arguments: Any, **named: Any) -> None:
        begin(self, *arguments, **named)
        self.embed_attrs["scale"] = math.sqrt(self.hidden_size)

    builder.__init__ = begun
