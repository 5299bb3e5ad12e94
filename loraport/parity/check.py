"""One line of a verification's report."""

from __future__ import annotations

from dataclasses import dataclass

from loraport.parity.metrics import Comparison


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
