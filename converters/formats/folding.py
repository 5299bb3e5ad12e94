"""Fold a scale into B where a format has no other place for it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from loraport.adapter import LoraModule
from loraport.errors import Problems
from loraport.scaling import alpha_for

if TYPE_CHECKING:
    import torch

_SAME = 1e-11  # alpha / r * r / r may be a few units in the last place off alpha / r
_ROOM = 16  # elements down to this part of B's largest keep all digits


def most_common(values: Iterable[float]) -> float:
    """Return the commonest of the values; 1 where there are none."""
    counted = Counter(values).most_common(1)
    return counted[0][0] if counted else 1.0


def fold_to(path: str, module: LoraModule, scaling: float, problems: Problems) -> LoraModule:
    """Return a module with this scaling that computes the same.

    ``B' = B * (module.scaling / scaling)``, computed in float64 and rounded once to B's own
    dtype; B itself where the scalings agree. Where that leaves the dtype's range, as it may in
    float16, A and B' share the factor: each takes a power of two, which rounds nothing.

    Args:
        path: Module path, for messages.
        module: The module as trained.
        scaling: The scaling it is to have, not 0.
        problems: Where is recorded what leaves the range all the same.
    """
    import torch

    alpha = alpha_for(module.rank, scaling)
    if math.isclose(module.scaling, scaling, rel_tol=_SAME):
        return replace(module, alpha=alpha, use_rslora=False)
    factor = module.scaling / scaling
    smallest_normal = torch.finfo(module.lora_B.dtype).tiny
    pair = module.lora_A, (module.lora_B.double() * factor).to(module.lora_B.dtype)
    if not _ROOM * smallest_normal <= _largest(pair[1]) < math.inf:
        before = module.lora_A, module.lora_B
        if all(math.isfinite(_largest(tensor)) for tensor in before):  # else readers refuse it
            pair = max(pair, _balanced(*before, factor), key=_lesser)
        if _lesser(pair) < min(smallest_normal, _lesser(before) / 2):
            problems.add(
                path,
                f"B times {factor:g} to fit {module.lora_B.dtype}",
                "an underflow" if abs(factor) < 1 else "an overflow",
                "convert the adapter to float32 first",
            )
    bias = module.lora_B_bias
    if bias is not None:
        bias = (bias.double() * factor).to(bias.dtype)
    return replace(
        module,
        lora_A=pair[0],
        lora_B=pair[1],
        lora_B_bias=bias,
        alpha=alpha,
        use_rslora=False,
    )


def _balanced(a: torch.Tensor, b: torch.Tensor, factor: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A and ``B * factor``, a power of two moved between them to make them equally large."""
    wide = b.double() * factor
    size_a, size_b = _largest(a), _largest(wide)
    if not size_a or not size_b:
        return a, wide.to(b.dtype)
    shift = 2.0 ** round((math.log2(size_b) - math.log2(size_a)) / 2)
    return (a.double() * shift).to(a.dtype), (wide / shift).to(b.dtype)


def _largest(tensor: torch.Tensor) -> float:
    return float(tensor.abs().max()) if tensor.numel() else 0.0


def _lesser(pair: tuple[torch.Tensor, torch.Tensor]) -> float:
    """Return the largest element of that matrix where it is smaller; -1 if one overflowed."""
    sizes = [_largest(tensor) for tensor in pair]
    return min(sizes) if max(sizes) < math.inf else -1.0
