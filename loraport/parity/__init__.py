"""Parity: the same numbers from PyTorch and from ONNX Runtime."""

from loraport.parity.check import Check
from loraport.parity.metrics import Comparison, compare
from loraport.parity.protocol import Sample
from loraport.parity.tolerances import Tolerance, tolerance_for
from loraport.parity.verification import Verification, verify_bundle

__all__ = [
    "Check",
    "Comparison",
    "Sample",
    "Tolerance",
    "Verification",
    "compare",
    "tolerance_for",
    "verify_bundle",
]
