"""What a base's ``config.json`` says of it; nothing is loaded."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loraport.errors import LoraportError

_COUNTS = re.compile(r"(num_|n_)(\w+_)?(layers?|experts?|blocks?|heads?|stages?)")
_MOST = 100_000  # of layers, heads and the like; none has a hundredth as many
# Of transformers' language models those that also look ahead.
_BOTH_WAYS = ("XLMWithLMHeadModel", "XLNetLMHeadModel")


def read_model_config(directory: Path) -> dict[str, Any]:
    """Read a base's ``config.json``.

    Raises:
        LoraportError: If it is missing or damaged.
    """
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise LoraportError(f"{directory / 'config.json'}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise LoraportError(f"{directory / 'config.json'}: expected an object")
    _refuse_endless(config, directory)
    return config


def _refuse_endless(config: Mapping[str, Any], directory: Path) -> None:
    """Refuse a configuration that would have a model built of more parts than there can be.

    Even without weights, every layer takes its time.

    Raises:
        LoraportError: Naming the number.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_endless(value, directory)
        elif _COUNTS.fullmatch(key) and isinstance(value, int | float) and not value <= _MOST:
            raise LoraportError(
                f"{directory / 'config.json'}: {key}: expected at most {_MOST}, got {value}; "
                "fetch it again"
            )


def architecture(directory: Path) -> str:
    """Return the class that a base's configuration names, empty where it names none."""
    return str((read_model_config(directory).get("architectures") or [""])[0])


def is_causal_lm(directory: Path) -> bool:
    """Tell whether a base's architecture is a decoder language model."""
    name = architecture(directory)
    if name.endswith("ForCausalLM"):
        return True
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if name.endswith("ForConditionalGeneration") or name in _BOTH_WAYS:
        return False
    # BERT's and others' are decoders only where the configuration says so.
    decoder = read_model_config(directory).get("is_decoder", True)
    return bool(decoder) and name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def decoder_class(directory: Path) -> str:
    """Say which class to name in a base's configuration, if it is a kind of decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(read_model_config(directory).get("model_type"))
    return f'; if it is one, write "architectures": ["{name}"] into its config.json' if name else ""
