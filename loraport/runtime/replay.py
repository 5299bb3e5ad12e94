"""Replay a bundle's golden cases, as a runner in any language does.

Two things are asked of each. No element may differ by more than the tolerance. And an adapter must
change the base's outputs here in the direction in which it changes the golden ones, more so than in
another adapter's: where kernels round so much that the tolerance is as wide as an adapter's effect,
this is what proves the swap. Of an adapter whose whole effect is less than twice what rounding does
to the base, only a change is asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from loraport.bundle.golden import BASE_CASE, read_golden
from loraport.runtime.model import Runtime

Outputs = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class GoldenResult:
    """How one golden case came out here.

    Attributes:
        name: The case.
        max_abs: Largest absolute difference of an output's element; infinite if one is not
            finite or has another shape.
        tolerance: Largest one allowed.
        swapped: Whether its adapters change the base's outputs as they change the golden ones.
    """

    name: str
    max_abs: float
    tolerance: float
    swapped: bool = True

    @property
    def passed(self) -> bool:
        """Tell whether the outputs are near enough; anything not a number is not."""
        return bool(self.max_abs <= self.tolerance) and self.swapped


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
    cases = runtime.manifest.golden
    golden: dict[str, Outputs] = {}
    here: dict[str, Outputs] = {}
    for name, case in cases.items():
        inputs, golden[name] = read_golden(runtime.directory, case)
        here[name] = runtime.run(inputs, case.adapters or None, list(golden[name]))
    alone = [name for name, case in cases.items() if len(case.adapters) == 1]
    results = []
    for name, expected in golden.items():
        largest = max(
            (_difference(expected[key], here[name][key]) for key in expected), default=math.inf
        )
        swapped = True
        if cases[name].adapters and BASE_CASE in golden and math.isfinite(largest):
            # A blend lies between its adapters, so it is not asked to be told from them.
            rivals = [other for other in alone if other != name] if name in alone else []
            swapped = _swapped(name, rivals, golden, here)
        results.append(GoldenResult(name, largest, runtime.manifest.tolerance, swapped))
    return results


def _swapped(
    name: str, rivals: list[str], golden: Mapping[str, Outputs], here: Mapping[str, Outputs]
) -> bool:
    """Tell whether a case changes the base as its golden outputs do, and not as a rival's."""
    base = golden[BASE_CASE]
    if not (_alike(golden[name], base) and _alike(here[BASE_CASE], base)):
        return False
    change = _change(here[name], here[BASE_CASE])
    wanted = _change(golden[name], base)
    direction = _cosine(change, wanted)
    # The change is between two runs, each with its own rounding.
    rounding = _change(here[BASE_CASE], base)
    if np.linalg.norm(wanted) <= 2 * np.linalg.norm(rounding):
        return direction != 0
    others = [golden[rival] for rival in rivals if _alike(golden[rival], base)]
    return direction > 0 and all(
        direction >= _cosine(change, _change(other, base)) for other in others
    )


def _alike(one: Outputs, other: Outputs) -> bool:
    return {key: each.shape for key, each in one.items()} == {
        key: each.shape for key, each in other.items()
    }


def _change(outputs: Outputs, base: Outputs) -> np.ndarray:
    """Return the difference of all outputs, one after the other, float64."""
    return np.concatenate(
        [(outputs[key].astype(np.float64) - base[key]).ravel() for key in sorted(outputs)]
    )


def _cosine(change: np.ndarray, wanted: np.ndarray) -> float:
    """Return the cosine of their angle; 0 where one is nothing, 1 where both are."""
    size = np.linalg.norm(change) * np.linalg.norm(wanted)
    if size == 0:
        return float(not change.any() and not wanted.any())
    return float(change @ wanted / size)


def _difference(expected: np.ndarray, got: np.ndarray) -> float:
    if expected.shape != got.shape or not np.isfinite(got).all():
        return float("inf")
    return float(np.abs(expected.astype(np.float64) - got).max(initial=0))
