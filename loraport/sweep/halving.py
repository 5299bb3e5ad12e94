"""Give up the worse half of the candidates early, again and again.

Successive halving (Jamieson and Talwalkar 2016, arXiv:1502.07943): candidates train for a share of
their steps, the better half of them for twice that share, and so on; the last train to their end.
Every candidate follows the schedule of its whole training, so those that are left learn what they
would have learned without.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from loraport.sweep.trial import Outcome


def shares(times: int) -> list[float]:
    """Return the shares of the steps after which candidates pause, the last being the whole.

    >>> shares(3)
    [0.125, 0.25, 0.5, 1.0]
    """
    return [0.5**power for power in range(times, -1, -1)]


def step_at(steps: int, share: float) -> int:
    """Return the step that a share of the steps ends with.

    >>> step_at(10, 0.25), step_at(3, 0.125), step_at(10, 1.0)
    (3, 1, 10)
    """
    return math.ceil(steps * share)


def worse_half(outcomes: Iterable[Outcome], share: float) -> dict[str, str]:
    """Return name → reason for those to give up after a share of their steps.

    They are compared by the lowest validation loss until then; of equal ones the first is better.
    An odd one is not given up, nor is one that ended before by itself. What came later is not
    looked at: asked again, the answer is the same.

    Args:
        outcomes: Of all candidates, those that were given up here among them.
        share: Of the steps.
    """
    losses, steps = {}, {}
    for outcome in outcomes:
        step = step_at(outcome.steps, share)
        seen = {at: loss for at, loss in outcome.validations if 0 < at <= step}
        if step in seen:
            losses[outcome.name], steps[outcome.name] = min(seen.values()), step
    ranked = sorted(losses, key=losses.__getitem__)
    return {
        name: f"step {steps[name]}: its validation loss {losses[name]:.4f} was number {place} "
        f"of {len(ranked)}"
        for place, name in enumerate(ranked, 1)
        if place > math.ceil(len(ranked) / 2)
    }
