"""Which candidates train in one pass."""

from __future__ import annotations

from collections.abc import Sequence

from loraport.sweep.trial import Trial


def group_trials(
    trials: Sequence[Trial], together: int, workers: int = 1
) -> tuple[tuple[Trial, ...], ...]:
    """Divide candidates into groups of nearly one size, neighbours together.

    Neighbours in a grid share targets and rank, so their small products run as one. Candidates
    with dropout train alone: what is dropped would differ in company.

    Args:
        trials: All candidates.
        together: Most candidates in a group.
        workers: There are at least so many groups, as far as there are candidates.

    >>> from loraport.training.options import LoraOptions
    >>> [len(group) for group in group_trials([Trial(str(i), LoraOptions(), 1.0)
    ...                                        for i in range(7)], together=3)]
    [3, 2, 2]
    """
    alone = [trial for trial in trials if trial.lora.dropout]
    others = [trial for trial in trials if not trial.lora.dropout]
    groups: list[tuple[Trial, ...]] = [(trial,) for trial in alone]
    if others:
        count = max(-(-len(others) // together), min(workers - len(alone), len(others)))
        groups = [*_even(others, count), *groups]
    return tuple(groups)


def halves(trials: Sequence[Trial]) -> tuple[tuple[Trial, ...], ...]:
    """Return two halves."""
    return tuple(_even(trials, 2))


def _even(trials: Sequence[Trial], count: int) -> list[tuple[Trial, ...]]:
    size, longer = divmod(len(trials), count)
    groups, start = [], 0
    for index in range(count):
        end = start + size + (index < longer)
        groups.append(tuple(trials[start:end]))
        start = end
    return groups
