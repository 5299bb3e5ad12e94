"""Experts of transformers that a router chooses, which torch exports in one of three ways alone.

Grouped products, which transformers multiplies by where nothing else is asked for, have no operator
of ONNX, and a loop over the experts in use decides by values; products in one batch are exported.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_GROUPED, _BATCHED = "grouped_mm", "batched_mm"


@contextmanager
def batched_experts(module: nn.Module) -> Iterator[None]:
    """Let experts multiply in one batch for a while, where they would by groups.

    Args:
        module: The module; it is as it was afterwards.
    """
    configs: dict[int, Any] = {}
    for part in module.modules():
        config = getattr(part, "config", None)
        if getattr(config, "_experts_implementation", None) == _GROUPED:
            configs[id(config)] = config
    for config in configs.values():
        config._experts_implementation = _BATCHED
    try:
        yield
    finally:
        for config in configs.values():
            config._experts_implementation = _GROUPED
