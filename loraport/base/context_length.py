"""How many tokens a base takes at most."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraport.base.config import read_model_config

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# Their first token has the position after the padding token's number.
_POSITIONS_AFTER_PADDING = (
    *("camembert", "data2vec-text", "roberta", "roberta-prelayernorm"),
    *("xlm-roberta", "xlm-roberta-xl", "xmod"),
)


def context_length(directory: Path) -> int | None:
    """Return how many tokens a base takes at most, by whatever name; ``None`` where it sets none.

    Raises:
        LoraportError: If the configuration is missing or damaged.
    """
    from transformers import AutoConfig

    plain = read_model_config(directory)
    try:
        return context_of(AutoConfig.from_pretrained(directory, trust_remote_code=False))
    except (OSError, ValueError, KeyError, TypeError):
        # Of a kind that transformers does not have, only the plain name is known.
        return _positive(plain.get("max_position_embeddings"))


def context_of(config: PretrainedConfig) -> int | None:
    """Return how many tokens a model of a configuration takes at most; see `context_length`."""
    text = config.get_text_config()
    length = _positive(getattr(text, "max_position_embeddings", None))
    if length is not None and text.model_type in _POSITIONS_AFTER_PADDING:
        return _positive(length - 1 - (text.pad_token_id or 0))
    return length


def _positive(length: object) -> int | None:
    return length if isinstance(length, int) and length > 0 else None
