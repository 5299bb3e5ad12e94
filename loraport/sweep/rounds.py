"""Train all candidates: in groups, and where they are halved in between, round by round."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import closing
from itertools import groupby
from typing import Protocol

from loraport.sweep.groups import group_trials
from loraport.sweep.halving import shares, step_at, worse_half
from loraport.sweep.observer import SweepObserver
from loraport.sweep.store import Store
from loraport.sweep.trial import Outcome, Trial
from loraport.sweep.worker import Setting, Trained, Worker

Group = tuple[Trial, ...]
Passes = Generator[tuple[Group, list[Trained]], None, None]


class Trainers(Protocol):
    """What trains groups: this process, or others."""

    def passes(self, groups: Sequence[Group], until: float, store: Store) -> Passes:
        """Train groups until a share of their steps; yield each as it ends.

        Args:
            groups: Candidates of each pass, all after the same step.
            until: Share of the steps.
            store: Where candidates that paused are.
        """
        ...


class ThisProcess:
    """Trains one group after the other in this process, on a base loaded for the first.

    Args:
        setting: What candidates share.
        trials: All candidates.
        observer: Told what happens.
    """

    def __init__(self, setting: Setting, trials: Sequence[Trial], observer: SweepObserver) -> None:
        self._all = (setting, trials, observer)
        self._worker: Worker | None = None

    def passes(self, groups: Sequence[Group], until: float, store: Store) -> Passes:
        """As `Trainers` says; what is under way is kept in the store now and then."""
        for group in groups:
            if self._worker is None:
                self._worker = Worker(*self._all)
                store.require_base(self._all[1], self._worker.adapted)
            yield group, self._worker.train(group, until, store.starts(group), store.add)


def train_all(
    trials: Sequence[Trial],
    trainers: Trainers,
    store: Store,
    *,
    halving: int,
    together: int,
    workers: int,
    observer: SweepObserver,
) -> None:
    """Train all candidates that are not in the store, and those that paused, into it.

    Args:
        trials: The candidates.
        trainers: Who trains them.
        store: Where they are kept.
        halving: How often the worse half is given up.
        together: Most candidates of a pass.
        workers: Passes at a time.
        observer: Told what happens.
    """
    there = store.outcomes(trials)

    def groups(share: float) -> list[Group]:
        going = [trial for trial in trials if _goes_on(there.get(trial.name), share)]
        return _groups(going, there, together, workers)

    observer.planned(
        groups=len(groups(1.0)),
        trials=len(trials),
        done=sum(not outcome.paused for outcome in there.values()),
    )
    for share in shares(halving):
        with closing(trainers.passes(groups(share), share, store)) as passes:
            for group, trained in passes:
                store.add(trained)
                there |= {each.trial.name: each.outcome for each in trained}
                observer.group_finished(names=[trial.name for trial in group])
        if share == 1.0:
            return
        reasons = worse_half((there[trial.name] for trial in trials), share)
        for trial in trials:
            if trial.name in reasons and there[trial.name].paused:
                store.give_up(trial, reasons[trial.name])
                there |= store.outcomes([trial])
                observer.ended(name=trial.name, reason=reasons[trial.name])


def _goes_on(outcome: Outcome | None, share: float) -> bool:
    """Tell whether a candidate trains before it has taken a share of its steps."""
    if outcome is None:
        return True
    return outcome.paused and outcome.step < step_at(outcome.steps, share)


def _groups(
    trials: Sequence[Trial], there: Mapping[str, Outcome], together: int, workers: int
) -> list[Group]:
    """Divide candidates into groups that stand after the same step."""

    def step(trial: Trial) -> int:
        return there[trial.name].step if trial.name in there else 0

    return [
        group
        for _, level in groupby(sorted(trials, key=step), step)
        for group in group_trials(list(level), together, workers)
    ]
