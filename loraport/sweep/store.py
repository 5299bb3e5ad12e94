"""Candidates on disk as they stand, so that a sweep that was stopped does not train them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, cast

from loraport.errors import LoraportError
from loraport.fingerprint import BaseFingerprint
from loraport.output import new_directory, new_file
from loraport.peft_layout.read import WEIGHTS_FILE, read_peft
from loraport.peft_layout.write import peft_contents, save_contents
from loraport.sweep.output import IDENTITY_FILE
from loraport.sweep.trial import Outcome, Trial
from loraport.sweep.worker import Trained
from loraport.training.run.checkpoints import load_state, require_same_run, save_state

T = TypeVar("T", bool, int, float, str)

_OUTCOME, _CANDIDATES = "outcome.json", "candidates"


class Store:
    """The directory of a sweep under way: one directory for each candidate that was trained.

    A candidate is known by what it is, not by its name: a sweep can be continued with other
    candidates in its grid.

    Args:
        directory: Made if it is not there.
        identity: What a continued sweep must share.

    Raises:
        LoraportError: If what is there belongs to another sweep.
    """

    def __init__(self, directory: Path, identity: Mapping[str, Any]) -> None:
        self.directory = directory
        path = directory / IDENTITY_FILE
        if path.exists():
            try:
                stored = json.loads(path.read_bytes())
                if not isinstance(stored, dict):
                    raise TypeError(f"{stored!r}")
            except (OSError, ValueError, TypeError, RecursionError) as error:
                raise LoraportError(
                    f"{path}: expected what loraport wrote, got {error}; start anew with --force"
                ) from error
            require_same_run(directory, stored, identity)
        else:
            directory.mkdir(parents=True, exist_ok=True)
            with new_file(path) as partial:
                partial.write_text(json.dumps(identity) + "\n")

    def add(self, trained: Sequence[Trained]) -> None:
        """Keep candidates as they stand."""
        for each in trained:
            contents = None if each.adapter is None else peft_contents(each.adapter)
            document = asdict(replace(each.outcome, modules=None, state=None))
            with new_directory(self._path(each.trial), force=True) as partial:
                if each.adapter is not None and contents is not None:
                    save_contents(partial, each.adapter, *contents)
                if each.state is not None:
                    save_state(partial, each.state)
                (partial / _OUTCOME).write_text(json.dumps(document) + "\n")

    def outcomes(self, trials: Sequence[Trial]) -> dict[str, Outcome]:
        """Return name → outcome of those that are there, without matrices and states.

        Raises:
            LoraportError: If something is damaged.
        """
        return {
            trial.name: _outcome(self._path(trial), trial)
            for trial in trials
            if (self._path(trial) / _OUTCOME).is_file()
        }

    def complete(self, trials: Sequence[Trial]) -> bool:
        """Tell whether all candidates are there and have ended.

        Raises:
            LoraportError: If something is damaged.
        """
        there = self.outcomes(trials).values()
        return len(there) == len(trials) and not any(outcome.paused for outcome in there)

    def read(self, trial: Trial) -> Trained:
        """Return a candidate that is there.

        Raises:
            LoraportError: If it is damaged.
        """
        path = self._path(trial)
        outcome = _outcome(path, trial)
        adapter = read_peft(path) if (path / WEIGHTS_FILE).exists() else None
        return Trained(trial, outcome, adapter, load_state(path) if outcome.paused else None)

    def starts(self, trials: Sequence[Trial]) -> dict[str, Trained]:
        """Return name → what those that paused go on from.

        Raises:
            LoraportError: If something is damaged.
        """
        there = self.outcomes(trials)
        paused = [trial for trial in trials if trial.name in there and there[trial.name].paused]
        return {trial.name: self.read(trial) for trial in paused}

    def require_base(self, trials: Sequence[Trial], here: BaseFingerprint) -> None:
        """Refuse to go on where a candidate that is there was trained on another base.

        Its loss would be compared with those of candidates on this one.

        Args:
            trials: The candidates.
            here: Fingerprint of the base at hand.

        Raises:
            LoraportError: Naming the modules that differ, or if something is damaged.
        """
        there = self.outcomes(trials)
        for trial in trials:
            adapter = self.read(trial).adapter if trial.name in there else None
            if adapter is not None and adapter.base_fingerprint is not None:
                what = f"candidate {trial.name}"
                adapter.base_fingerprint.require_same_base(here, what, "the base at hand")

    def give_up(self, trial: Trial, reason: str) -> None:
        """End a candidate that paused."""
        paused = self.read(trial)
        outcome = replace(paused.outcome, ended=reason, paused=False)
        self.add([replace(paused, outcome=outcome, state=None)])

    def _path(self, trial: Trial) -> Path:
        return self.directory / _CANDIDATES / _key(trial)


def keeps_any(directory: Path) -> bool:
    """Tell whether a store holds steps of any candidate, from which it can go on."""
    return any(directory.glob(f"{_CANDIDATES}/*/{_OUTCOME}"))


def _key(trial: Trial) -> str:
    """Return a name for a candidate that depends on what it is alone."""
    facts = {**asdict(trial), "name": ""}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _outcome(path: Path, trial: Trial) -> Outcome:
    try:
        document = json.loads((path / _OUTCOME).read_bytes())
        best = document["best"]
        outcome = Outcome(
            name=trial.name,
            losses=_by_step(document["losses"]),
            validations=_by_step(document["validations"]),
            best=None if best is None else _by_step([best])[0],
            row_losses=tuple(_of(float, each) for each in document["row_losses"]),
            row_weights=tuple(_of(int, each) for each in document["row_weights"]),
            ended=_of(str, document["ended"]),
            failed=_of(bool, document["failed"]),
            steps=_of(int, document["steps"]),
            paused=_of(bool, document["paused"]),
        )
        if outcome.best is not None and outcome.best not in outcome.validations:
            raise ValueError(f"a best {best} that is none of the validations")
        if len(outcome.row_losses) != len(outcome.row_weights):
            rows, weights = len(outcome.row_losses), len(outcome.row_weights)
            raise ValueError(f"losses of {rows} rows and weights of {weights}")
        return outcome
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise LoraportError(
            f"{path}: expected what loraport wrote, got {error!r}; remove this directory to train "
            "the candidate again"
        ) from error


def _by_step(entries: Any) -> tuple[tuple[int, float], ...]:
    """Read pairs of a step and a loss.

    Raises:
        ValueError: If something else is there, or the steps do not rise.
        TypeError: The same.
    """
    pairs = tuple((_of(int, step), _of(float, loss)) for step, loss in entries)
    if any(step >= after for (step, _), (after, _) in pairwise(pairs)):
        raise ValueError(f"steps {[step for step, _ in pairs]}"[:80])
    return pairs


def _of(kind: type[T], value: Any) -> T:
    """Return a value of a kind; whole numbers are of both kinds of numbers, truth values of none.

    Raises:
        TypeError: If it is of another.
    """
    given = float if kind is float and type(value) is int else type(value)
    if given is not kind:
        raise TypeError(f"{str(value)[:40]} in place of a {kind.__name__}")
    return cast(T, value)
