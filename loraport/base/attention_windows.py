"""How far back each layer of a decoder looks."""

from __future__ import annotations

from typing import Any

# Their layers have the window of their configuration, all of them; other kinds tell layer by layer.
_ALL_LAYERS = frozenset(["mistral", "mixtral", "phi3", "phimoe", "starcoder2"])
EVERYTHING = -1


def attention_windows(config: Any) -> tuple[int, ...]:
    """Return how many tokens each layer attends to, its own included; -1 for all before it.

    Args:
        config: A transformers configuration of a decoder, or of a model that has one for text.
    """
    config = config.get_text_config()
    layers = int(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    if not window:
        return (EVERYTHING,) * layers
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kind = "sliding_attention" if config.model_type in _ALL_LAYERS else "full_attention"
        kinds = [kind] * layers
    return tuple(int(window) if kind == "sliding_attention" else EVERYTHING for kind in kinds)
