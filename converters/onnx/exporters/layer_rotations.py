"""Decoders some or all of whose layers rotate nothing, for GenAI's builder.

Version 0.18 fails at SmolLM3's, which it means to rotate outside attention, and rotates the layers
of a Granite 4 whose configuration has no ``position_embedding_type``.
"""

from __future__ import annotations

from typing import Any


def mend(builders: Any) -> None:
    """Let the builder rotate the layers alone that the model rotates.

    Args:
        builders: The builder's module of that name; changed in place.
    """
    _by_layer(builders.SmolLM3Model)
    _of_granite(builders.GraniteMoEHybridModel)


def _by_layer(builder: Any) -> None:
    make = builder.make_attention

    def made(self: Any, layer_id: int, *arguments: Any, **named: Any) -> None:
        self.attention_attrs["rope"] = bool(self.no_rope_layers[layer_id])
        make(self, layer_id, *arguments, **named)

    builder.make_attention = made


def _of_granite(builder: Any) -> None:
    begin = builder.__init__

    def begun(self: Any, config: Any, *arguments: Any, **named: Any) -> None:
        begin(self, config, *arguments, **named)
        if config.position_embedding_type != "rope":
            self.attention_attrs["rope"] = self.attention_attrs["use_rope_in_attn"] = False

    builder.__init__ = begun
