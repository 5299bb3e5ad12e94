"""What an adapter may contain beyond plain LoRA on linear layers, and who can hold it."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

from loraport.adapter import Adapter, LoraModule, ModuleKind, Replacement
from loraport.errors import Problems
from loraport.naming import bias_name

# Kinds whose A and B are matrices.
PLAIN_KINDS = frozenset({ModuleKind.LINEAR, ModuleKind.EMBEDDING})

_MERGE_FIRST = "merge it into the base and convert that, or choose another format"


class Feature(StrEnum):
    """Something that not every format can express; the value is how errors name it."""

    EMBEDDING = "LoRA on an embedding"
    CONV = "LoRA on a convolution"
    EXPERTS = "LoRA on a bare parameter, such as fused experts (target_parameters)"
    DORA = "a DoRA magnitude"
    LORA_BIAS = "a bias on lora_B"
    ZERO_SCALING = "an alpha of 0 (most formats take it for no scaling at all)"
    BIAS = "a trained bias"
    WHOLE_PARAMETER = "a parameter saved in full (modules_to_save)"
    TOKEN_ROWS = "trained token rows"


def module_features(module: LoraModule) -> Iterator[Feature]:
    """Yield what one module needs of a format beside plain LoRA."""
    if module.kind is ModuleKind.EMBEDDING:
        yield Feature.EMBEDDING
    if module.kind is ModuleKind.CONV:
        yield Feature.CONV
    if module.kind is ModuleKind.EXPERTS:
        yield Feature.EXPERTS
    if module.magnitude is not None:
        yield Feature.DORA
    if module.lora_B_bias is not None:
        yield Feature.LORA_BIAS
    if module.scaling == 0:
        yield Feature.ZERO_SCALING


def replacement_feature(parameter: str, replacement: Replacement) -> Feature:
    """Return what one replacement needs of a format."""
    if replacement.rows is not None:
        return Feature.TOKEN_ROWS
    is_bias = parameter == "bias" or parameter == bias_name(parameter.rpartition(".")[0])
    return Feature.BIAS if is_bias else Feature.WHOLE_PARAMETER


def cannot_hold(adapter: Adapter, holds: frozenset[Feature], format_name: str) -> Problems:
    """Return one problem for each thing of an adapter that a format cannot express.

    Args:
        adapter: What is to be written.
        holds: What the format can express.
        format_name: The format, for the messages.
    """
    problems = Problems()
    expected = f"something {format_name} can hold"
    for path, module in adapter.modules.items():
        for feature in module_features(module):
            if feature not in holds:
                problems.add(path, expected, feature.value, _MERGE_FIRST)
    for parameter, replacement in adapter.replacements.items():
        feature = replacement_feature(parameter, replacement)
        if feature not in holds:
            problems.add(parameter, expected, feature.value, _MERGE_FIRST)
    return problems
