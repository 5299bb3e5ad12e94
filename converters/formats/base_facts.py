"""What formats need to know of a base model beside its module names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraport.base.checkpoint import Checkpoint
from loraport.base.config import read_model_config


@dataclass(frozen=True)
class BaseFacts:
    """The part of a base's configuration that adapters' formats depend on.

    Attributes:
        model_type: transformers' name of the architecture.
        layers: Number of transformer layers, where the configuration says it.
        heads: Attention heads.
        kv_heads: Key and value heads, fewer under grouped-query attention.
        tied: The output head shares the input embedding's weight.
    """

    model_type: str
    layers: int | None
    heads: int | None
    kv_heads: int | None
    tied: bool


def read_base_facts(directory: Path) -> BaseFacts:
    """Read a base's facts; keys that its ``config.json`` leaves out get transformers' defaults.

    Raises:
        LoraportError: If ``config.json`` is missing or damaged.
    """
    config = _with_defaults(directory)
    heads = _whole(config, "num_attention_heads", "n_head")
    return BaseFacts(
        model_type=str(config.get("model_type")),
        layers=_whole(config, "num_hidden_layers", "n_layer"),
        heads=heads,
        kv_heads=_whole(config, "num_key_value_heads") or heads,
        tied=bool(config.get("tie_word_embeddings", False)),
    )


def module_paths(directory: Path) -> list[str]:
    """Return the paths of all modules of a base that own a weight.

    Raises:
        LoraportError: If there are no weights or they are damaged.
    """
    return list(module_rows(directory))


def module_rows(directory: Path) -> dict[str, int]:
    """Return the path of every module of a base that owns a weight, and the weight's rows.

    Raises:
        LoraportError: If there are no weights or they are damaged.
    """
    checkpoint = Checkpoint(directory)
    return {
        name.removesuffix(".weight"): (*checkpoint.info(name).shape, 0)[0]
        for name in checkpoint
        if name.endswith(".weight")
    }


def layers_per_block(directory: Path) -> int | None:
    """Return how many layers the blocks of a diffusion model have, where all have as many."""
    return _whole({"layers_per_block": 2, **read_model_config(directory)}, "layers_per_block")


def component_class(directory: Path) -> str:
    """Return the name of a base's class, transformers' or diffusers'; empty where it has none.

    Raises:
        LoraportError: If ``config.json`` is missing or damaged.
    """
    config = read_model_config(directory)
    architectures = config.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    return str(config.get("_class_name") or first)


def _with_defaults(directory: Path) -> Mapping[str, Any]:
    raw = read_model_config(directory)
    if "model_type" not in raw:
        return raw
    from transformers import AutoConfig

    try:
        known = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        known = known.get_text_config()
    # An architecture that transformers does not know, or values that it does not take.
    except Exception:
        return raw
    # `to_dict` renames what GPT-2 and its kin call n_head and n_layer.
    return {**known.to_dict(), "tie_word_embeddings": known.tie_word_embeddings}


def _whole(config: Mapping[str, Any], *keys: str) -> int | None:
    for key in keys:
        value = config.get(key)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None
