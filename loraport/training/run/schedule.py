"""The learning rate by step."""

from __future__ import annotations

import math
from typing import Any

from loraport.errors import LoraportError
from loraport.training.options import LoopOptions


def learning_rate(step: int, total: int, peak: float, warmup: float) -> float:
    """Return the rate of one step: a linear rise to ``peak``, then a cosine down towards 0.

    Args:
        step: Number of the step, the first being 1.
        total: Number of all steps.
        peak: The largest rate.
        warmup: Share of the steps that rise.

    >>> [round(learning_rate(step, 6, 1.0, 0.34), 2) for step in range(1, 7)]
    [0.5, 1.0, 0.9, 0.65, 0.35, 0.1]
    """
    rising = round(total * warmup)
    if step <= rising:
        return peak * step / rising
    # One step more than there are, so that the last step still learns.
    progress = (step - rising) / (total - rising + 1)
    return peak * 0.5 * (1 + math.cos(math.pi * progress))


def total_steps(batches: Any, options: LoopOptions) -> int:
    """Return the number of optimizer steps of a run.

    Raises:
        LoraportError: If epochs are to be counted and the batches have no length.
    """
    if options.steps is not None:
        return options.steps
    if not hasattr(batches, "__len__"):
        raise LoraportError(
            "batches: expected a length, to know how many steps an epoch has, got none; give steps"
        )
    return options.epochs * -(-len(batches) // options.accumulate)
