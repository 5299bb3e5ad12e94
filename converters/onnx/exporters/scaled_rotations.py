"""Rotations that are scaled for longer texts, for GenAI's builder.

Version 0.18 scales Llama's and SmolLM3's as Llama 3 does or not at all, and YaRN's without
rounding where its ramp begins and ends, nor with ``attention_factor``; it knows no dynamic ones and
needs settings that have defaults. The tables are made of transformers' own frequencies instead.
Phi-3's, which has two tables, it reads in the words of transformers 4 alone and scales by what it
computes itself; it makes two of any Phi-3 whose context is not its original one, and none of the
short factors alone.
"""

from __future__ import annotations

from typing import Any

import torch

from loraport.base.rotation_border import rotation_border

_LONGROPE = "longrope"
_TABLES = ("linear", "dynamic", "yarn", "llama3")  # the same for every length up to the context's


def mend(builders: Any) -> None:
    """Let the builder make its tables of rotations of a configuration's own frequencies.

    Args:
        builders: The builder's module of that name; changed in place.
    """
    model = builders.Model
    begin, make = model.make_rope_init, model.make_rotary_embedding_caches_from_scratch

    def begun(self: Any, config: Any) -> None:
        self.own_frequencies = own_frequencies(config)
        if self.own_frequencies is None:
            begin(self, config)

    def made(self: Any) -> Any:
        own = getattr(self, "own_frequencies", None)
        if own is None:
            return make(self)
        frequencies, scale = own
        return tables(frequencies, scale, self.rope_attrs["cache_length"])

    model.make_rope_init = builders.LlamaModel.make_rope_init = begun
    for each in (model, builders.GPTOSSModel):
        each.make_rotary_embedding_caches_from_scratch = made
    two_tables, one_table = builders.Phi3MiniLongRoPEModel, builders.Phi3MiniModel
    _scale_by_its_own(two_tables)

    def chosen(config: Any, *arguments: Any) -> Any:
        builder = one_table if rotation_border(config) is None else two_tables
        return builder(config, *arguments)

    builders.Phi3MiniLongRoPEModel = chosen


def _scale_by_its_own(builder: Any) -> None:
    begin = builder.make_rope_init

    def begun(self: Any, config: Any) -> None:
        settings = config.rope_parameters
        settings.setdefault("type", _LONGROPE)
        settings["short_mscale"] = settings["long_mscale"] = _frequencies(config)[1]
        begin(self, config)

    builder.make_rope_init = begun


def own_frequencies(config: Any) -> tuple[torch.Tensor, float] | None:
    """Return the frequencies ``[dim / 2]`` of a decoder and what multiplies its tables.

    Args:
        config: Its configuration.

    Returns:
        ``None`` where nothing is scaled, or by more than one table.
    """
    settings = getattr(config, "rope_parameters", None) or {}
    kind = settings.get("rope_type")
    one = kind in _TABLES or (kind == _LONGROPE and rotation_border(config) is None)
    if not one or hasattr(config, "rope_local_base_freq"):  # Gemma 3 has two
        return None
    return _frequencies(config)


def _frequencies(config: Any) -> tuple[torch.Tensor, float]:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    kind = config.rope_parameters["rope_type"]
    frequencies, scale = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))
    return frequencies, float(scale)


def tables(
    frequencies: torch.Tensor, scale: float, length: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return cosines and sines ``[length, dim]`` float32, each angle twice as in transformers."""
    angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
    angles = torch.cat((angles, angles), dim=-1)
    return angles.cos() * scale, angles.sin() * scale
