"""How far PyTorch comes from float32 when it computes in the floats that a graph computes in.

No table knows a model: a few very large activations magnify every rounding, and the logits of
SmolLM2 in float16 are 0.3 from those in float32 in PyTorch, too. Where a graph in halves is further
from float32 than the table says, PyTorch in the same halves, on the same inputs, is the measure:
twice its distance is allowed, as in FlashAttention's tests.

A few tokens hang on single roundings. With one of them an adapter's logits moved by 4.6 in float32,
and by 8.8 in float16, when the embeddings were moved by less than a rounding
(``tests/benchmarks/rounding.py --moved``). Of such, one run says little: those that are further off
than twice its distance are measured by several, each with its inputs moved.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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
_DRAWS = 4


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

    def moved(
        self, inputs: Iterable[Mapping[str, np.ndarray]], changes: Changes
    ) -> list[Comparison]:
        """Compare each as `measure` does, the worst of some runs with inputs moved a little.

        By less than a rounding: its floats, or the embeddings of its tokens.

        Args:
            inputs: Arguments of ``forward`` by name, one set after the other.
            changes: What the adapters change of the model.
        """
        found = []
        for each in inputs:
            with adapted(self._model, changes):
                expected = torch_outputs(self._model, each)
            draws: list[Comparison] = []
            for seed in range(_DRAWS):
                with adapted(self._halved, changes), _moved(self._halved, each, seed) as near:
                    got = torch_outputs(self._halved, near)
                draws += [compare(e, g) for e, g in zip(expected, got, strict=True)]
            found.append(worst(draws))
        return found

    @cached_property
    def _halved(self) -> nn.Module:
        dtype: torch.dtype = getattr(torch, self._floats)
        return copy.deepcopy(self._model).to(dtype)


@contextmanager
def _moved(
    model: nn.Module, inputs: Mapping[str, np.ndarray], seed: int
) -> Iterator[Mapping[str, np.ndarray]]:
    """Give inputs whose floats are moved by less than a rounding; without any, move embeddings."""
    random = torch.Generator().manual_seed(seed)
    rounding = torch.finfo(next(model.parameters()).dtype).eps

    def near(x: torch.Tensor) -> torch.Tensor:
        drawn = torch.rand(x.shape, generator=random).to(x.device) - 0.5
        return (x.float() * (1 + drawn * rounding)).to(x.dtype)

    floats = {name: array for name, array in inputs.items() if array.dtype.kind == "f"}
    embeddings: Callable[[], nn.Module] | None = getattr(model, "get_input_embeddings", None)
    if floats or embeddings is None:
        moved = {name: near(torch.from_numpy(array)).numpy() for name, array in floats.items()}
        yield {**inputs, **moved}
        return
    handle = embeddings().register_forward_hook(lambda module, given, output: near(output))  # noqa: ARG005
    try:
        yield inputs
    finally:
        handle.remove()


def allowed_beside(tolerance: Tolerance, own: Comparison) -> Tolerance:
    """Return the table's bounds, each widened to twice PyTorch's own distance where that is more.

    Args:
        tolerance: Of the table.
        own: What `Rounding.measure` gave; no measure where it is not finite.
    """
    if not math.isfinite(own.max_abs):
        return tolerance
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
