"""From an adapter's modules and replacements to changes of stored matrices."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from converters.merge.arithmetic import Change
from loraport.adapter import LoraModule, ModuleKind, Replacement
from loraport.base.storage import is_transposed
from loraport.errors import LoraportError
from loraport.variants import lower

if TYPE_CHECKING:
    import torch


def weight_change(
    module: LoraModule,
    shape: tuple[int, ...],
    strength: float,
    replacement: torch.Tensor | None = None,
) -> Change:
    """Return what a module does to its weight.

    Args:
        module: The adapted module; ``fan_in_fan_out`` must be right if its weight is square.
        shape: Shape of the base weight as stored.
        strength: Factor on the change.
        replacement: The weight that the adapter stores in place of the base's, if any.

    Raises:
        LoraportError: If the shapes do not fit, or the update has no place in the weight.
    """
    transposed = is_transposed(module, shape)
    if module.groups > 1:
        raise LoraportError(
            f"LoRA on a convolution with {module.groups} groups: its A sees the channels of all "
            "groups and a grouped kernel has no place for that (PEFT cannot merge it either); "
            "keep the adapter beside the base, or export it with `loraport export`"
        )
    # The gain is computed in float64 here, from the weight as it streams by.
    update = lower(replace(module, magnitude=None))
    left, right = (update.a.T, update.b.T) if transposed else (update.b, update.a)
    return Change(
        strength=strength,
        left=left,
        right=right,
        scaling=update.scaling,
        replacement=None if replacement is None else replacement.flatten(1),
        magnitude=module.magnitude,
        transposed=transposed,
    )


def bias_change(module: LoraModule, strength: float) -> Change | None:
    """Return what a module does to its bias ``[out, 1]``, or ``None``."""
    if module.lora_B_bias is None:
        return None
    bias = module.lora_B_bias.double().flatten()[:, None]
    return Change(strength=strength, left=bias, right=bias.new_ones(1, 1), scaling=module.scaling)


def replacement_change(replacement: Replacement, strength: float) -> Change:
    """Return what a replaced parameter, or replaced rows of one, does."""
    tensor = replacement.tensor
    matrix = tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)
    return Change(strength=strength, replacement=matrix, token_rows=replacement.rows)


def mirrored(first: LoraModule, second: LoraModule) -> bool:
    """Tell whether an embedding's and a head's, or another embedding's, update are the same.

    PEFT's ``ensure_weight_tying`` makes such pairs: A of one is B of the other, transposed.
    """
    if first.magnitude is not None or second.magnitude is not None:
        return False
    if first.kind is second.kind is ModuleKind.EMBEDDING:
        return (
            first.scaling == second.scaling
            and first.lora_A.equal(second.lora_A)
            and first.lora_B.equal(second.lora_B)
        )
    if {first.kind, second.kind} != {ModuleKind.EMBEDDING, ModuleKind.LINEAR}:
        return False
    return (
        first.scaling == second.scaling
        and first.lora_A.T.equal(second.lora_B)
        and first.lora_B.T.equal(second.lora_A)
    )


def same_replacement(first: Replacement | None, second: Replacement | None) -> bool:
    """Tell whether two parameters are replaced alike."""
    if first is None or second is None:
        return first is second
    return first.rows == second.rows and first.tensor.equal(second.tensor)


def touched_parameters(
    modules: Mapping[str, LoraModule], replacements: Mapping[str, Replacement]
) -> Iterator[str]:
    """Yield the parameter path of everything an adapter says."""
    from loraport.naming import bias_name, weight_name

    seen = set()
    for path, module in modules.items():
        if module.kind is ModuleKind.EXPERTS:
            seen.add(path)
            yield path
            continue
        seen.add(weight_name(path))
        yield weight_name(path)
        if module.lora_B_bias is not None:
            seen.add(bias_name(path))
            yield bias_name(path)
    for parameter in replacements:
        if parameter not in seen:
            yield parameter
