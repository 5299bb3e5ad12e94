"""How far two computations of the same model may differ, by precision and provider.

The only table of tolerances. Each line carries its reason.
"""

from __future__ import annotations

from dataclasses import dataclass

from loraport.errors import LoraportError


@dataclass(frozen=True)
class Tolerance:
    """Bounds on one comparison of logits or other outputs.

    Attributes:
        max_abs: Largest absolute difference of an element.
        relative: Largest relative Frobenius norm of the difference.
        top1: Smallest share of positions whose largest element is the same.
        reason: Why these bounds.
        floats: What the kernels compute in, as PyTorch calls it: where that is halves, PyTorch in
            the same may widen the bounds (`loraport.parity.rounding`).
    """

    max_abs: float
    relative: float
    top1: float
    reason: str
    floats: str = "float32"


_HALF, _BRAIN = "float16", "bfloat16"
_TOLERANCES = {
    ("fp32", "cpu"): Tolerance(1e-3, 1e-4, 1.0, "sums in another order, 24-bit mantissas"),
    ("fp32", "cuda"): Tolerance(2e-3, 1e-4, 1.0, "the same with TF32 off and other kernels"),
    ("fp16", "cpu"): Tolerance(0.15, 1e-2, 0.97, "11-bit mantissas; weights rounded once", _HALF),
    ("fp16", "cuda"): Tolerance(0.15, 1e-2, 0.97, "11-bit mantissas; weights rounded once", _HALF),
    # The reference has the graph's own dequantized weights and the kernels are asked for float32
    # activations; what is left are sums in another order, which the few very large activations
    # of 4-bit language models magnify (0.04 seen on SmolLM2, where an adapter changes 8).
    ("int4", "cpu"): Tolerance(0.1, 2e-3, 0.99, "the graph's own weights, float32 activations"),
    ("int4", "cuda"): Tolerance(0.15, 1e-2, 0.97, "11-bit mantissas of the activations", _HALF),
    # 8-bit weights are compared as 4-bit ones are; their kernels always round the activations too.
    ("int8", "cpu"): Tolerance(0.5, 0.1, 0.9, "activations rounded to 8 bits by the kernel"),
    ("int8", "cuda"): Tolerance(0.15, 1e-2, 0.97, "11-bit mantissas of the activations", _HALF),
    ("bf16", "cpu"): Tolerance(1.0, 8e-2, 0.9, "8-bit mantissas; weights rounded once", _BRAIN),
    ("bf16", "cuda"): Tolerance(1.0, 8e-2, 0.9, "8-bit mantissas; weights rounded once", _BRAIN),
}
# 8-bit activations are the kernel's choice, not ours: reported, and refused only when absurd.
AS_DEPLOYED = Tolerance(float("inf"), 1.0, 0.75, "activations rounded to 8 bits by the kernel")
# Between one ONNX Runtime and another, on the golden cases. Where kernels round activations, a
# bundle allows the rounding that is measured when its cases are recorded, if that is more, and less
# than half of what its cases are apart.
_GOLDEN = {"fp32": 1e-3, "fp16": 0.1, "bf16": 1.0, "int8": 1.0, "int4": 1.0}
# Native kernels round the activations of 4-bit products to 8 bits, WASM's do so otherwise and
# WebGPU's not at all: 1.3 and 1.5 seen on SmolLM2, whose logits reach 31. That is as much as a
# small adapter changes, so runners also ask that an adapter changes the base's outputs in the
# direction in which it changes the golden ones.
_GOLDEN_IN_BROWSERS = {"int4": {"wasm": 3.0, "webgpu": 3.0}}


def golden_tolerance(precision: str) -> float:
    """Return how far a runner's output may be from a golden value."""
    return _GOLDEN[precision]


def golden_tolerances(precision: str) -> dict[str, float]:
    """Return the browser runtimes that need another golden tolerance, each with its own."""
    return dict(_GOLDEN_IN_BROWSERS.get(precision, {}))


def tolerance_for(precision: str, provider: str) -> Tolerance:
    """Return the tolerance of a precision on a provider.

    Raises:
        LoraportError: If the pair is unknown.
    """
    try:
        return _TOLERANCES[precision, provider]
    except KeyError:
        raise LoraportError(
            f"tolerance: expected a precision and provider of {sorted(_TOLERANCES)}, "
            f"got {(precision, provider)}"
        ) from None
