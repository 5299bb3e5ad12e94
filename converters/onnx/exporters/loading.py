"""Load a base that is exported, and see to what its files lack."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.base_model import (
    architecture,
    is_causal_lm,
    load_causal_lm,
    load_model_as_it_is,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMED = 5


def load_exported(directory: Path, progress: Callable[[str], None]) -> PreTrainedModel:
    """Load a base; of one that is no decoder, say which weights transformers drew at random.

    A decoder's logits need all of them. An encoder's pooler may well be absent and of no use.

    Args:
        directory: Model directory in the Hugging Face layout.
        progress: Told what the files lack, and of a class that was guessed.

    Raises:
        LoraportError: If it cannot be loaded, or is a decoder whose files lack weights.
    """
    if is_causal_lm(directory):
        return load_causal_lm(str(directory))
    model, missing = load_model_as_it_is(str(directory))
    if not architecture(directory):
        progress(
            "the base's config.json names no class (architectures): exported as "
            f"{type(model).__name__}, without a head"
        )
    if missing:
        more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
        progress(
            f"the base's files lack {', '.join(missing[:_NAMED])}{more}: drawn at random, so "
            "outputs that depend on them mean nothing unless an adapter stores them (--replace)"
        )
    return model
