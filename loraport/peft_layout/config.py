"""What the keys of PEFT's ``adapter_config.json`` mean to the maths."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraport.errors import Problems
from loraport.json_object import read_json_object
from loraport.scaling import RankAndAlpha

# Honoured by `LoraSettings` or by the tensors themselves.
_HONOURED = frozenset(
    (
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "bias",
        "use_dora",
        "lora_bias",
        "modules_to_save",
        "trainable_token_indices",
        "target_parameters",
    )
)
# Say how the adapter was made or is to be handled, never what it computes.
_TRAINING_ONLY = frozenset(
    (
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "target_modules",
        "exclude_modules",
        "lora_dropout",
        "layers_to_transform",
        "layers_pattern",
        "megatron_config",
        "megatron_core",
        "runtime_config",
        "ensure_weight_tying",
        "eva_config",
        "loftq_config",
        "corda_config",
        "lora_ga_config",
        "velora_config",
        "qalora_group_size",
        "init_lora_weights",
    )
)
# Change the maths and are not handled: refused with what to do instead.
_REFUSED = {
    "layer_replication": "merge it with PEFT",
    "alora_invocation_tokens": "it switches on inside a prompt, which no merged or exported "
    "model can do; keep it in PEFT",
    "arrow_config": "it routes between adapters at run time; export its adapters one by one",
    "use_qalora": "merge it with PEFT",
    "use_bdlora": "merge it with PEFT",
    "kasa_config": "merge it with PEFT",
    "monteclora_config": "merge it with PEFT",
}
# Initialisations that leave the base weights alone.
_PLAIN_INITS = ("true", "false", "gaussian", "eva", "orthogonal", "mica")
# Initialisations that take the initial update out of the base weights, so that the initial
# adapter leads back to them; the adapter belongs to the changed base.
_BASE_CHANGING_INITS = ("pissa", "olora", "corda", "lora_ga")


@dataclass(frozen=True)
class LoraSettings:
    """The part of an adapter configuration that the maths depends on.

    Attributes:
        ranks: Rank and alpha by module.
        use_rslora: Rank-stabilised scaling.
        use_dora: Every module carries a magnitude vector.
        lora_bias: Every ``lora_B`` carries a bias.
        fan_in_fan_out: The targeted linear weights are stored ``[in, out]``.
        token_indices: Rows of trained tokens: embedding module name → rows; ``""`` names
            the model's input embedding.
        target_parameters: Parameters (rather than modules) with LoRA: fused experts.
        base_model: Name or path of the base.
        training: Facts that do not change the maths.
    """

    ranks: RankAndAlpha
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    token_indices: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    target_parameters: tuple[str, ...] = ()
    base_model: str | None = None
    training: Mapping[str, Any] = field(default_factory=dict)


def read_config(path: Path, *, changed_base: bool = False) -> LoraSettings:
    """Read an ``adapter_config.json``.

    Args:
        path: The file.
        changed_base: Accept initialisations that change the base weights.

    Raises:
        LoraportError: If it cannot be read, is no LoRA configuration, or asks for maths
            that loraport does not do; every such key is named.
    """
    config = read_json_object(path)
    return parse_config(config, str(path), changed_base=changed_base)


def parse_config(
    config: Mapping[str, Any], source: str, *, changed_base: bool = False
) -> LoraSettings:
    """Return what a configuration's keys mean; see `read_config`.

    Args:
        config: The keys of an ``adapter_config.json``.
        source: Where they are from, for messages.
        changed_base: Accept initialisations that change the base weights.

    Raises:
        LoraportError: If it is no LoRA configuration, or asks for maths that loraport does not
            do; every such key is named.
    """
    problems = Problems()
    if str(config.get("peft_type", "LORA")).upper() != "LORA":
        problems.add(
            "peft_type", "LORA", repr(config["peft_type"]), "only LoRA adapters are handled"
        )
    for key, value in config.items():
        _check_key(key, value, problems, changed_base=changed_base)
    settings = _settings(config, problems)
    problems.raise_if_any(f"{source} cannot be honoured")
    return settings


def _check_key(key: str, value: Any, problems: Problems, *, changed_base: bool) -> None:
    if value in (None, False, "", 0) or value == [] or value == {}:
        return
    if key in _REFUSED:
        problems.add(key, "it unset", _shown(value), _REFUSED[key])
    elif key == "init_lora_weights":
        _check_init(value, problems, changed_base=changed_base)
    elif key == "bias" and value not in ("none", "all", "lora_only"):
        problems.add(key, "none, all or lora_only", _shown(value))
    elif key not in _HONOURED and key not in _TRAINING_ONLY:
        problems.add(
            key,
            "a key of PEFT 0.21's LoRA configuration",
            _shown(value),
            "it may change the maths; unset it if it does not, or upgrade loraport",
        )


def changes_base(init: Any) -> bool:
    """Tell whether an ``init_lora_weights`` takes the initial update out of the base.

    >>> changes_base("pissa_niter_4"), changes_base(True)
    (True, False)
    """
    return str(init).lower().startswith(_BASE_CHANGING_INITS)


def _check_init(value: Any, problems: Problems, *, changed_base: bool) -> None:
    expected = "an initialisation that leaves the base weights alone"
    if changes_base(value):
        if not changed_base:
            problems.add(
                "init_lora_weights",
                expected,
                _shown(value),
                "this adapter belongs to a changed base: give the adapter as it was before "
                "training with --initial-adapter (of `loraport convert` and `loraport merge`)",
            )
    elif str(value).lower() == "loftq":
        problems.add(
            "init_lora_weights",
            expected,
            _shown(value),
            "this adapter belongs to the base that LoftQ quantized, and no initial adapter leads "
            "back from there: save that base, set init_lora_weights to true in a copy of the "
            "adapter and merge the copy into it",
        )
    elif str(value).lower() not in _PLAIN_INITS:
        problems.add(
            "init_lora_weights",
            f"one of PEFT 0.21's: {', '.join((*_PLAIN_INITS, *_BASE_CHANGING_INITS))}",
            _shown(value),
            "it may have changed the base; set it to true in a copy if it did not",
        )


def _settings(config: Mapping[str, Any], problems: Problems) -> LoraSettings:
    rank = _number(config, "r", 8, problems)
    rank_pattern = _numbers(config, "rank_pattern", problems)
    for key, value in {"r": rank, **rank_pattern}.items():
        if value != int(value) or value < 1:
            problems.add(key, "a rank: a whole number of at least 1", _shown(value))
    base_model = config.get("base_model_name_or_path")
    kept = (
        *("task_type", "target_modules", "lora_dropout", "peft_version", "init_lora_weights"),
        "ensure_weight_tying",
    )
    return LoraSettings(
        ranks=RankAndAlpha(
            r=int(rank),
            lora_alpha=_number(config, "lora_alpha", 8, problems),
            rank_pattern={key: int(value) for key, value in rank_pattern.items()},
            alpha_pattern=_numbers(config, "alpha_pattern", problems),
        ),
        use_rslora=_flag(config, "use_rslora", problems),
        use_dora=_flag(config, "use_dora", problems),
        lora_bias=_flag(config, "lora_bias", problems),
        fan_in_fan_out=_flag(config, "fan_in_fan_out", problems),
        token_indices=_token_indices(config.get("trainable_token_indices"), problems),
        target_parameters=_names(config, "target_parameters", problems),
        base_model=base_model if isinstance(base_model, str) and base_model else None,
        training={key: config[key] for key in kept if config.get(key) is not None},
    )


def _number(config: Mapping[str, Any], key: str, default: float, problems: Problems) -> float:
    value = config.get(key, default)
    # Not `abs(value) > limit`: that lets NaN through.
    if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e12:
        problems.add(key, "a number", _shown(value))
        return default
    return value


def _numbers(config: Mapping[str, Any], key: str, problems: Problems) -> dict[str, float]:
    value = config.get(key) or {}
    if not isinstance(value, dict):
        problems.add(key, "an object of pattern → number", _shown(value))
        return {}
    return {pattern: _number(value, pattern, 1, problems) for pattern in value}


def _flag(config: Mapping[str, Any], key: str, problems: Problems) -> bool:
    value = config.get(key) or False
    if not isinstance(value, bool):
        problems.add(key, "true or false", _shown(value))
    return bool(value)


def _names(config: Mapping[str, Any], key: str, problems: Problems) -> tuple[str, ...]:
    value = config.get(key) or []
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        problems.add(key, "a list of names", _shown(value))
        return ()
    return tuple(value)


def _token_indices(value: Any, problems: Problems) -> dict[str, tuple[int, ...]]:
    by_module = value if isinstance(value, dict) else {"": value} if value else {}
    indices: dict[str, tuple[int, ...]] = {}
    for module, rows in by_module.items():
        if not isinstance(rows, list) or not all(isinstance(r, int) and r >= 0 for r in rows):
            problems.add("trainable_token_indices", "lists of token ids", _shown(value))
            return {}
        indices[module] = tuple(rows)
    return indices


def _shown(value: Any) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 80 else text[:77] + "..."
