"""One line of a verification's report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from loraport.parity.metrics import Comparison

_SHOWN = 5  # of what is wrong


@dataclass(frozen=True)
class Check:
    """One line of the report.

    Attributes:
        name: What was compared, e.g. ``"adapter tickets: onnxruntime = torch"``.
        passed: The verdict.
        detail: Why it failed, or what was seen.
        comparison: The numbers, where the check has any.
        calibrated: It failed by the graph's own calibrated quantization alone.
    """

    name: str
    passed: bool
    detail: str = ""
    comparison: Comparison | None = None
    calibrated: bool = False


def first_reasons(wrong: Sequence[str]) -> str:
    """Return what is wrong as one text: the first reasons, and how many more there are."""
    more = f"; and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
    return "; ".join(wrong[:_SHOWN]) + more
