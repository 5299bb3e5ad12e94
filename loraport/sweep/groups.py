"""Which candidates train in one pass."""

from __future__ import annotations

from collections.abc import Sequence

from loraport.sweep.trial import Trial

# On a CPU a product takes as long as its arithmetic from some hundred tokens on: with 8 candidates
# together, each takes 0.55 of its time alone at 32 tokens, 0.86 at 128, 1.0 at 512 (SmolLM2-135M).
_TOGETHER, _TOKENS_ON_CPU = 16, 512


def most_together(device: str, tokens: float) -> int:
    """Return how many candidates train in one pass where nobody says.

    On a CPU no more than can make it faster, as each takes its own memory.

    Args:
        device: Type of the device.
        tokens: Of one candidate's batch.

    >>> most_together("cuda", 2000), most_together("cpu", 100), most_together("cpu", 2000)
    (16, 5, 1)
    """
    if device != "cpu":
        return _TOGETHER
    return max(1, min(_TOGETHER, int(_TOKENS_ON_CPU / max(tokens, 1))))


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
