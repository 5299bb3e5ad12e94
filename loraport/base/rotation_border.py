"""How long a decoder's text may be before all of it is rotated by other factors."""

from __future__ import annotations

from typing import Any


def rotation_border(config: Any) -> int | None:
    """Return how many tokens a text may have before longrope's long factors rotate all of it.

    Keys that were cached until then were rotated by the short ones, so that transformers' Phi-3
    computes the whole text anew there.

    Args:
        config: A transformers configuration of a decoder, of a model that has one for text, or
            ``None``.

    Returns:
        ``None`` where there are no two sets of factors, or no text is as long.

    Source: transformers' ``modeling_rope_utils`` and ``Phi3ForCausalLM``.
    """
    if config is None:
        return None
    config = config.get_text_config()
    settings = getattr(config, "rope_parameters", None) or {}
    if settings.get("rope_type") != "longrope":
        return None
    border = int(settings["original_max_position_embeddings"])
    return border if border < config.max_position_embeddings else None
