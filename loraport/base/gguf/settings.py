"""What a GGUF file says of its model beyond what transformers' reader takes from it.

transformers 5.23 reads sizes and, of most architectures, the base of the rotation; the rest stays
at its defaults, with which the same weights are another model: Llama 3.1's stretched rotation is
gone. llama.cpp computes with the following.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

FREQUENCY_FACTORS = "rope_freqs.weight"
LONG_FACTORS = "rope_factors_long.weight"
SHORT_FACTORS = "rope_factors_short.weight"
_UNREAD_BASE = ("starcoder2", "stablelm")
_PARTLY_ROTATED = ("phi3", "stablelm", "nemotron")
_EXPERTS = {
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}
_SCALED_LIKE_27B = {"gemma2": 46, "gemma3": 62}  # by their layers, as llama.cpp tells them
_LLAMA3_LOW, _LLAMA3_HIGH = 1.0, 4.0
_CONTEXTS = [1 << power for power in range(9, 20)]  # Llama 3.1's is 8192
_FACTOR_TOLERANCE = 1e-4  # they are stored in float32, computed from frequencies in float32


def unread_settings(
    architecture: str, fields: Mapping[str, Any], tables: Mapping[str, list[float]]
) -> dict[str, Any]:
    """Return what else to give to transformers' configuration of a file's model.

    Args:
        architecture: ``general.architecture``.
        fields: All fields of the file, by key.
        tables: Those of its tensors that are tables of the rotation, by name.

    Raises:
        ValueError: If its rotation is one that transformers' configuration cannot say.
    """
    own = {
        key.removeprefix(f"{architecture}."): value
        for key, value in fields.items()
        if key.startswith(f"{architecture}.")
    }
    settings: dict[str, Any] = {}
    if "rope.freq_base" in own and architecture in _UNREAD_BASE:
        settings["rope_theta"] = float(own["rope.freq_base"])
    if architecture == "llama":
        settings["model_type"] = "llama"  # transformers reads one called mistral as another
    scaling = _rope_scaling(own, tables)
    if scaling is not None:
        settings["rope_scaling"] = scaling
    if LONG_FACTORS in tables:
        settings["original_max_position_embeddings"] = _trained_context(own)
    if architecture in _PARTLY_ROTATED and "rope.dimension_count" in own:
        settings["partial_rotary_factor"] = own["rope.dimension_count"] / _head(own)
    if "attention.key_length" in own and architecture == "qwen3":
        settings["head_dim"] = int(own["attention.key_length"])
    if architecture in ("qwen2moe", "qwen3moe"):
        settings |= {name: int(own[key]) for key, name in _EXPERTS.items() if key in own}
    if architecture in _SCALED_LIKE_27B:
        settings["query_pre_attn_scalar"] = _attention_scalar(architecture, own)
    return settings


def _attention_scalar(architecture: str, own: Mapping[str, Any]) -> int:
    """Return the number whose root divides Gemma's attention scores."""
    if own["block_count"] == _SCALED_LIKE_27B[architecture]:
        return _head(own)
    return int(own.get("attention.key_length", _head(own)))


def _head(own: Mapping[str, Any]) -> int:
    return int(own["embedding_length"]) // int(own["attention.head_count"])


def _rope_scaling(
    own: Mapping[str, Any], tables: Mapping[str, list[float]]
) -> dict[str, Any] | None:
    """Return ``rope_scaling``, ``None`` where positions are rotated as they are."""
    factor = float(own.get("rope.scaling.factor") or own.get("rope.scale_linear") or 0)
    kind = own.get("rope.scaling.type", "linear" if factor else "none")
    if LONG_FACTORS in tables and SHORT_FACTORS in tables:
        attention = float(own.get("rope.scaling.attn_factor", 1.0))
        factors = {"long_factor": tables[LONG_FACTORS], "short_factor": tables[SHORT_FACTORS]}
        return {"rope_type": "longrope", **factors, "attention_factor": attention}
    stretched = _llama3(own, tables.get(FREQUENCY_FACTORS, []))
    if kind in ("none", "linear") and factor in (0, 1):
        return stretched
    if kind == "linear" and stretched is None:
        return {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and stretched is None and factor:
        return {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": _trained_context(own),
            "attention_factor": float(own.get("rope.scaling.attn_factor", 1.0))
            * (1 + 0.1 * math.log(factor)),
            "beta_fast": float(own.get("rope.scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(own.get("rope.scaling.yarn_beta_slow", 1.0)),
        }
    beside = f" beside {FREQUENCY_FACTORS}" if stretched else ""
    raise ValueError(
        f"its rotary positions: expected rope.scaling.type none, linear, yarn or Llama 3's "
        f"{FREQUENCY_FACTORS}, got {kind} with factor {factor:g}{beside}; convert the model that "
        "the file was made of, not the file"
    )


def _llama3(own: Mapping[str, Any], factors: list[float]) -> dict[str, Any] | None:
    """Return Llama 3.1's scaling by what it divides each frequency by, ``None`` where by one.

    The file has the divisors alone; of the settings they follow from, one is tried after another.
    """
    if all(factor == 1 for factor in factors):
        return None
    theta = float(own.get("rope.freq_base", 10000.0))
    most = float(f"{max(factors):.5g}")  # 8, not 7.9999995
    for context in _CONTEXTS:
        expected = [
            _llama3_divisor(theta ** (-number / len(factors)), most, context)
            for number in range(len(factors))
        ]
        pairs = zip(factors, expected, strict=True)
        if all(math.isclose(*pair, rel_tol=_FACTOR_TOLERANCE) for pair in pairs):
            return {
                "rope_type": "llama3",
                "factor": most,
                "low_freq_factor": _LLAMA3_LOW,
                "high_freq_factor": _LLAMA3_HIGH,
                "original_max_position_embeddings": context,
            }
    raise ValueError(
        f"{FREQUENCY_FACTORS}: expected what Llama 3.1 divides its rotation's frequencies by, got "
        f"{[round(factor, 3) for factor in factors[:8]]}...; convert the model that the file was "
        "made of, not the file"
    )


def _llama3_divisor(frequency: float, factor: float, context: int) -> float:
    turns = context * frequency / (2 * math.pi)  # over the whole of the first context
    smooth = (turns - _LLAMA3_LOW) / (_LLAMA3_HIGH - _LLAMA3_LOW)
    smooth = min(max(smooth, 0.0), 1.0)
    return 1 / ((1 - smooth) / factor + smooth)


def _trained_context(own: Mapping[str, Any]) -> int:
    return int(own.get("rope.scaling.original_context_length") or own["context_length"])
