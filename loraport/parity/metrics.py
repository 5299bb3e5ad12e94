"""Compare two outputs, element by element. A comparison is data with a verdict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from loraport.parity.tolerances import Tolerance


@dataclass(frozen=True)
class Comparison:
    """How two outputs ``[..., classes]`` differ.

    Attributes:
        max_abs: Largest absolute difference of an element; infinite where either is not finite.
        relative: Frobenius norm of the difference over that of the reference.
        kl: Largest Kullback-Leibler divergence, in nats, of a position's softmax from the
            reference's.
        top1: Share of positions whose largest element is the same.
        positions: Number of positions compared.
    """

    max_abs: float
    relative: float
    kl: float
    top1: float
    positions: int

    def within(self, tolerance: Tolerance) -> bool:
        """Tell whether the difference is tolerated; anything not a number is not."""
        return (
            self.positions > 0
            and self.max_abs <= tolerance.max_abs
            and self.relative <= tolerance.relative
            and self.top1 >= tolerance.top1
        )


def compare(reference: np.ndarray, output: np.ndarray) -> Comparison:
    """Compare an output with its reference in float64.

    Args:
        reference: ``[..., classes]``.
        output: The same shape; another shape compares as infinitely far away.
    """
    if reference.shape != output.shape or reference.size == 0:
        return Comparison(np.inf, np.inf, np.inf, 0.0, 0)
    expected = reference.astype(np.float64).reshape(-1, reference.shape[-1])
    got = output.astype(np.float64).reshape(-1, output.shape[-1])
    if not (np.isfinite(expected).all() and np.isfinite(got).all()):
        return Comparison(np.inf, np.inf, np.inf, 0.0, len(expected))
    difference = got - expected
    norm = float(np.linalg.norm(expected))
    log_p, log_q = _log_softmax(expected), _log_softmax(got)
    divergence = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    return Comparison(
        max_abs=float(np.abs(difference).max()),
        relative=float(np.linalg.norm(difference)) / norm if norm else float(np.abs(got).max()),
        kl=float(divergence.max()),
        top1=float((expected.argmax(-1) == got.argmax(-1)).mean()),
        positions=len(expected),
    )


def worst(comparisons: list[Comparison]) -> Comparison:
    """Return the worst of each metric over several comparisons; none at all is a failure."""
    if not comparisons:
        return Comparison(np.inf, np.inf, np.inf, 0.0, 0)
    positions = sum(item.positions for item in comparisons)
    return Comparison(
        max_abs=max(item.max_abs for item in comparisons),
        relative=max(item.relative for item in comparisons),
        kl=max(item.kl for item in comparisons),
        top1=sum(item.top1 * item.positions for item in comparisons) / max(positions, 1),
        positions=positions,
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    result: np.ndarray = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return result
