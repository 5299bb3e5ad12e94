"""How far PyTorch comes from float32 when it computes in the floats that a graph computes in.

No table knows a model: a few very large activations magnify every rounding, and the logits of
SmolLM2 in float16 are 0.3 from those in float32 in PyTorch, too. Where a graph in halves is further
from float32 than the table says, PyTorch in the same halves, on the same inputs, is the measure:
twice its distance is allowed, as in FlashAttention's tests.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch
from torch import nn

from loraport.parity.changes import Changes
from loraport.parity.metrics import Comparison, compare, worst
from loraport.parity.reference import adapted, torch_outputs
from loraport.parity.tolerances import Tolerance

_TIMES = 2.0


class Rounding:
    """A model beside itself in halves.

    Args:
        model: In float32, in evaluation mode.
        floats: What the graph computes in, as PyTorch calls it: ``"float16"``, ``"bfloat16"``.
    """

    def __init__(self, model: nn.Module, floats: str) -> None:
        self._model = model
        self._floats = floats

    def measure(
        self, inputs: Iterable[Mapping[str, np.ndarray]], changes: Changes
    ) -> Comparison | None:
        """Compare the outputs of both; ``None`` where PyTorch has no kernels for the halves.

        Args:
            inputs: Arguments of ``forward`` by name, one set after the other.
            changes: What the adapters change of the model.
        """
        found: list[Comparison] = []
        for each in inputs:
            with adapted(self._model, changes):
                expected = torch_outputs(self._model, each)
            try:
                with adapted(self._halved, changes):
                    got = torch_outputs(self._halved, each)
            except RuntimeError:
                return None
            found += [compare(e, g) for e, g in zip(expected, got, strict=True)]
        return worst(found)

    @cached_property
    def _halved(self) -> nn.Module:
        dtype: torch.dtype = getattr(torch, self._floats)
        return copy.deepcopy(self._model).to(dtype)


def allowed_beside(tolerance: Tolerance, own: Comparison) -> Tolerance:
    """Return the table's bounds, each widened to twice PyTorch's own distance where that is more.

    Args:
        tolerance: Of the table.
        own: What `Rounding.measure` gave.
    """
    twice = replace(
        tolerance,
        max_abs=_TIMES * own.max_abs,
        relative=_TIMES * own.relative,
        top1=1 - _TIMES * (1 - own.top1),
    )
    return wider(tolerance, twice)


def wider(one: Tolerance, other: Tolerance) -> Tolerance:
    """Return bounds that allow what either allows."""
    return replace(
        one,
        max_abs=max(one.max_abs, other.max_abs),
        relative=max(one.relative, other.relative),
        top1=min(one.top1, other.top1),
    )
