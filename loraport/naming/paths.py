"""Module paths, PEFT's keys and the inputs of slots in ONNX graphs."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property

PEFT_PREFIX = "base_model.model."


class Part(StrEnum):
    """What a tensor is to its module; the value is PEFT's key after the module path."""

    LORA_A = "lora_A.weight"
    LORA_B = "lora_B.weight"
    LORA_B_BIAS = "lora_B.bias"
    EMBEDDING_A = "lora_embedding_A"
    EMBEDDING_B = "lora_embedding_B"
    MAGNITUDE = "lora_magnitude_vector"
    TOKEN_ROWS = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True)
class PeftKey:
    """A key of ``adapter_model.safetensors``, understood.

    Attributes:
        module_path: The adapted module.
        part: What the tensor is; ``None`` for a stored parameter of the model itself.
        parameter: Full parameter path where ``part`` is ``None``, else empty; without the
            ``base_layer`` or ``token_adapter`` that PEFT puts into the paths of adapted modules.
    """

    module_path: str
    part: Part | None
    parameter: str = ""


# Older PEFT versions wrote these; they mean the same tensors.
_PART_ALIASES = {
    "lora_magnitude_vector.weight": Part.MAGNITUDE,
    "trainable_tokens_delta": Part.TOKEN_ROWS,
}
# An adapted module keeps its own parameters one level further down in PEFT's models, two where
# its rows are trained.
_WRAPPED = ".base_layer"
_WRAPPED_ROWS = ".token_adapter.base_layer"
_PARTS = {**{part.value: part for part in Part}, **_PART_ALIASES}


def parse_peft_key(key: str) -> PeftKey | None:
    """Split a PEFT key, or return ``None`` if it is not one.

    >>> parse_peft_key("base_model.model.fc.lora_A.weight")
    PeftKey(module_path='fc', part=<Part.LORA_A: 'lora_A.weight'>, parameter='')
    """
    if not key.startswith(PEFT_PREFIX):
        return None
    rest = key.removeprefix(PEFT_PREFIX)
    if not re.fullmatch(r"[^.]+(\.[^.]+)*", rest):
        return None
    for suffix in sorted(_PARTS, key=len, reverse=True):
        if rest.endswith("." + suffix):
            return PeftKey(rest.removesuffix("." + suffix), _PARTS[suffix])
    if "lora_" in rest:
        return None
    path, _, leaf = rest.rpartition(".")
    while path.endswith(_WRAPPED):
        path = path.removesuffix(_WRAPPED_ROWS).removesuffix(_WRAPPED)
    return PeftKey(path, None, f"{path}.{leaf}" if path else leaf)


def peft_key(module_path: str, part: Part) -> str:
    """Return the key of one adapter tensor in PEFT's layout."""
    return f"{PEFT_PREFIX}{module_path}.{part.value}"


def peft_parameter_key(parameter: str, *, adapted: bool = False) -> str:
    """Return the key of a stored parameter of the model itself (a replacement).

    Args:
        parameter: Parameter path in the model.
        adapted: Its module carries LoRA matrices too.

    >>> peft_parameter_key("fc.bias", adapted=True)
    'base_model.model.fc.base_layer.bias'
    """
    path, _, leaf = parameter.rpartition(".")
    return f"{PEFT_PREFIX}{path}{_WRAPPED}.{leaf}" if adapted else PEFT_PREFIX + parameter


def is_module_path(path: str) -> bool:
    """Tell whether a name can be a module's or parameter's path: dotted words, nothing else.

    >>> is_module_path("model.layers.0.q_proj"), is_module_path("../weights")
    (True, False)
    """
    return re.fullmatch(r"[\w-]+(\.[\w-]+)*", path) is not None


def weight_name(module_path: str) -> str:
    """Return the state-dict name of a module's weight."""
    return f"{module_path}.weight"


def bias_name(module_path: str) -> str:
    """Return the state-dict name of a module's bias."""
    return f"{module_path}.bias"


def slot_a(slot: str) -> str:
    """Return the graph input that takes a slot's ``A`` ``[in, r]``."""
    return f"{slot}.lora_A"


def slot_b(slot: str) -> str:
    """Return the graph input that takes a slot's ``B`` ``[r, out]``, scaling folded in."""
    return f"{slot}.lora_B"


def slot_gain(slot: str) -> str:
    """Return the graph input that takes a slot's factor ``[out]`` on the base's output."""
    return f"{slot}.lora_gain"


def slot_bias(slot: str) -> str:
    """Return the graph input that takes what a slot adds to the output, ``[out]``."""
    return f"{slot}.lora_bias"


def slot_saved(parameter: str) -> str:
    """Return the graph input that takes a whole parameter in the base's place."""
    return f"{parameter}.lora_saved"


def lanes_input(members: int) -> str:
    """Return the graph input that says whose each column of ``A`` is, by a slot's modules."""
    return f"lora_lanes.{members}"


_SLOT_PARTS = ("lora_A", "lora_B", "lora_gain", "lora_bias", "lora_saved")


def parse_slot_input(name: str) -> tuple[str, str] | None:
    """Split a graph input that adapters fill into the slot, or the parameter, and what it takes.

    >>> parse_slot_input("h.0.q_proj.lora_A")
    ('h.0.q_proj', 'lora_A')
    >>> parse_slot_input("score.weight.lora_saved")
    ('score.weight', 'lora_saved')
    """
    slot, _, part = name.rpartition(".")
    return (slot, part) if slot and part in _SLOT_PARTS else None


def names_parameter(name: str, parameter: str) -> bool:
    """Tell whether a name given by a user means a parameter: its module, a part of it, or a leaf.

    >>> names_parameter("score", "model.score.weight"), names_parameter("bias", "h.0.fc.bias")
    (True, True)
    >>> names_parameter("norm", "h.0.layernorm.weight")
    False
    """
    return f".{name}." in f".{parameter}."


def packed_slot(module_paths: tuple[str, ...]) -> str:
    """Name the slot that several modules share because their weights are packed side by side.

    >>> packed_slot(("h.0.attn.q_proj", "h.0.attn.k_proj"))
    'h.0.attn.q_proj+k_proj'
    """
    first = module_paths[0]
    if len(module_paths) == 1:
        return first
    parents = {path.rpartition(".")[0] for path in module_paths}
    if len(parents) > 1:
        return "+".join(module_paths)
    return "+".join([first, *(path.rpartition(".")[2] for path in module_paths[1:])])


def path_endings(path: str) -> list[str]:
    """Return a path and what comes after each of its dots.

    >>> path_endings("h.0.fc")
    ['h.0.fc', '0.fc', 'fc']
    """
    parts = path.split(".")
    return [".".join(parts[start:]) for start in range(len(parts))]


class NameIndex:
    """Finds tensors whose names may lack, or have more of, the prefix of a wanted name.

    A checkpoint of GPT-2 may say ``h.0.attn.c_attn.weight`` where the module path starts
    with ``transformer.``, and the other way about.

    Args:
        names: The names there are.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)

    def candidates(self, wanted: str) -> list[str]:
        """Return the names that ``wanted`` may stand for: itself, or all that differ by a prefix.

        >>> NameIndex(["h.0.fc.weight", "h.1.fc.weight"]).candidates("transformer.h.1.fc.weight")
        ['h.1.fc.weight']
        """
        if wanted in self._names:
            return [wanted]
        shorter = [ending for ending in path_endings(wanted)[1:-1] if ending in self._names]
        return sorted([*shorter, *self._by_ending.get(wanted, ())])

    @cached_property
    def _by_ending(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = defaultdict(list)
        for name in self._names:
            for ending in path_endings(name)[1:-1]:  # the last word alone tells no tensor
                found[ending].append(name)
        return found
