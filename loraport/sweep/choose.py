"""Which candidate to take: the smallest that is as good as the best, as far as the data can tell.

The rule: the lowest validation loss is the best. Another candidate is *within noise* of it if its
loss is higher by no more than one standard error of that difference, measured row by row on the
same validation rows (the one-standard-error rule of Breiman et al. 1984, *Classification and
Regression Trees*, with paired differences: most of what makes a row hard is the same for both).
Of those within noise the one with the smallest adapter is taken; among equally small ones, that
with the lowest loss.

The error is that of a finite validation set. What another seed would change is not in it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from loraport.counts import counted
from loraport.errors import LoraportError
from loraport.sweep.trial import Outcome


@dataclass(frozen=True)
class Difference:
    """How much worse than the best a candidate is.

    Attributes:
        mean: Its validation loss less that of the best.
        error: Standard error of that; ``None`` where a single row allows none.
    """

    mean: float
    error: float | None

    @property
    def within_noise(self) -> bool:
        """Whether the difference is no larger than its error."""
        return self.mean <= (self.error or 0.0)


@dataclass(frozen=True)
class Choice:
    """Which candidate to take.

    Attributes:
        best: The one with the lowest validation loss.
        taken: The one to take.
        differences: Name → how it compares with the best; of all that were measured.
        reason: Why that one, in a sentence.
        better_than_base: Whether the validation loss of the one taken is below the base's.
    """

    best: str
    taken: str
    differences: Mapping[str, Difference]
    reason: str
    better_than_base: bool


def choose(outcomes: Sequence[Outcome], sizes: Mapping[str, int]) -> Choice:
    """Choose among candidates that were validated on the same rows.

    Args:
        outcomes: What came of them; those that failed are not taken.
        sizes: Name → size of the adapter, in whatever unit.

    Raises:
        LoraportError: If all failed, or one was measured otherwise than the others.
    """
    sound = {o.name: o for o in outcomes if o.best is not None and not o.failed}
    if not sound:
        reasons = "; ".join(f"{o.name}: {o.ended or 'it was not validated'}" for o in outcomes)
        raise LoraportError(
            f"the candidates: expected one that could be trained, got none ({reasons}); lower the "
            "learning rates or look at the data"
        )
    losses = {name: o.best[1] for name, o in sound.items() if o.best is not None}
    best = min(losses, key=lambda name: (losses[name], sizes[name]))
    rows = len(sound[best].row_weights)
    for name, outcome in sound.items():
        if len(outcome.row_weights) != rows:
            raise LoraportError(
                f"candidate {name}: expected {rows} measurements of the validation rows, as {best} "
                f"has, got {len(outcome.row_weights)}; another version of loraport kept it: sweep "
                "without --resume"
            )
    differences = {name: _difference(o, sound[best]) for name, o in sound.items()}
    near = [name for name, difference in differences.items() if difference.within_noise]
    taken = min(near, key=lambda name: (sizes[name], losses[name]))
    base = sound[taken].validations[0][1]
    return Choice(
        best=best,
        taken=taken,
        differences=differences,
        reason=_reason(best, taken, differences[taken], sizes, rows),
        better_than_base=losses[taken] < base,
    )


def _difference(one: Outcome, best: Outcome) -> Difference:
    """Compare two candidates row by row.

    With row sums ``t_i``, ``b_i`` of ``w_i`` losses, the difference of the means is
    ``D = sum(t - b) / sum(w)``; as a ratio of sums over ``n`` rows its variance is
    ``n / (n - 1) * sum((t_i - b_i - D w_i)^2) / sum(w)^2``.
    """
    weights = best.row_weights
    gaps = [t - b for t, b in zip(one.row_losses, best.row_losses, strict=True)]
    total, rows = sum(weights), len(weights)
    mean = sum(gaps) / total
    if rows < 2:
        return Difference(mean, None)
    squares = sum((gap - mean * weight) ** 2 for gap, weight in zip(gaps, weights, strict=True))
    return Difference(mean, math.sqrt(squares * rows / (rows - 1)) / total)


def _reason(
    best: str, taken: str, difference: Difference, sizes: Mapping[str, int], rows: int
) -> str:
    if taken == best:
        return "it has the lowest validation loss, and nothing smaller is within noise of it"
    size = f"{sizes[taken] / sizes[best]:.0%} of the size" if sizes[best] else "smaller"
    if sizes[taken] == sizes[best]:
        size = "the same size"
    return (
        f"the best, {best}, is better by {difference.mean:.4f}, which is within the noise of "
        f"{counted(rows, 'validation row')} (standard error {difference.error or 0.0:.4f}); "
        f"this one has {size}"
    )
