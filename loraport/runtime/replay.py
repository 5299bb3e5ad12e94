"""Replay a bundle's golden cases, as a runner in any language does."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loraport.bundle.golden import read_golden
from loraport.runtime.model import Runtime


@dataclass(frozen=True)
class GoldenResult:
    """How one golden case came out here.

    Attributes:
        name: The case.
        max_abs: Largest absolute difference of an output's element; infinite if one is not
            finite or has another shape.
        tolerance: Largest one allowed.
    """

    name: str
    max_abs: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Tell whether the outputs are near enough; anything not a number is not."""
        return bool(self.max_abs <= self.tolerance)


def replay_golden(bundle: Path, *, provider: str = "cpu") -> list[GoldenResult]:
    """Check a bundle's files, then run every golden case.

    Args:
        bundle: The bundle's directory.
        provider: ``"cpu"`` or ``"cuda"``.

    Raises:
        LoraportError: If the bundle is damaged.
    """
    return replay(Runtime(bundle, provider=provider))


def replay(runtime: Runtime) -> list[GoldenResult]:
    """Run every golden case of an opened bundle."""
    results = []
    for name, case in runtime.manifest.golden.items():
        inputs, expected = read_golden(runtime.directory, case)
        outputs = runtime.run(inputs, case.adapters or None, list(expected))
        differences = [_difference(expected[key], outputs[key]) for key in expected]
        largest = max(differences, default=float("inf"))
        results.append(GoldenResult(name, largest, runtime.manifest.tolerance))
    return results


def _difference(expected: np.ndarray, got: np.ndarray) -> float:
    if expected.shape != got.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(expected.astype(np.float64) - got).max())
