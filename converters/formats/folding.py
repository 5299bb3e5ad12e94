"""Fold a scale into B where a format has no other place for it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from converters.rounded_factors import lesser_size, rounded_factors
from loraport.adapter import LoraModule
from loraport.errors import Problems
from loraport.scaling import alpha_for

_SAME = 1e-11  # alpha / r * r / r may be a few units in the last place off alpha / r


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
    dtype = module.lora_B.dtype
    pair = rounded_factors(module.lora_A, module.lora_B.double() * factor, dtype)
    before = lesser_size((module.lora_A, module.lora_B))  # below 0, readers refuse it
    if before >= 0 and lesser_size(pair) < min(torch.finfo(dtype).tiny, before / 2):
        problems.add(
            path,
            f"B times {factor:g} to fit {dtype}",
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
