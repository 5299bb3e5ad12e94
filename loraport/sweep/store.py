"""Finished candidates on disk, so that a sweep that was stopped does not train them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from loraport.errors import LoraportError
from loraport.output import new_directory, new_file
from loraport.peft_layout.read import WEIGHTS_FILE, read_peft
from loraport.peft_layout.write import peft_contents, save_contents
from loraport.sweep.trial import Outcome, Trial
from loraport.sweep.worker import Finished
from loraport.training.checkpoints import require_same_run

_IDENTITY, _OUTCOME, _CANDIDATES = "sweep.json", "outcome.json", "finished"


class Store:
    """The directory of a sweep under way: one directory for each finished candidate.

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
        path = directory / _IDENTITY
        if path.exists():
            try:
                stored = json.loads(path.read_bytes())
            except ValueError as error:
                raise LoraportError(
                    f"{path}: expected what loraport wrote, got {error}; start anew with --force"
                ) from error
            require_same_run(directory, stored, identity)
        else:
            directory.mkdir(parents=True, exist_ok=True)
            with new_file(path) as partial:
                partial.write_text(json.dumps(identity) + "\n")

    def add(self, done: Finished) -> None:
        """Keep a finished candidate."""
        contents = None if done.adapter is None else peft_contents(done.adapter)
        document = asdict(replace(done.outcome, modules=None))
        with new_directory(self._path(done.trial), force=True) as partial:
            if done.adapter is not None and contents is not None:
                save_contents(partial, done.adapter, *contents)
            (partial / _OUTCOME).write_text(json.dumps(document) + "\n")

    def finished(self, trials: Sequence[Trial]) -> dict[str, Finished]:
        """Return name → what is there already.

        Raises:
            LoraportError: If something is damaged.
        """
        return {
            trial.name: _read(self._path(trial), trial)
            for trial in trials
            if (self._path(trial) / _OUTCOME).is_file()
        }

    def checkpoints(self, trials: Sequence[Trial]) -> Path:
        """Return where a group keeps what it needs to continue."""
        return self.directory / "running" / key_of(*trials)

    def _path(self, trial: Trial) -> Path:
        return self.directory / _CANDIDATES / key_of(trial)


def key_of(*trials: Trial) -> str:
    """Return a name for some candidates that depends on what they are alone."""
    facts = [{**asdict(trial), "name": ""} for trial in trials]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _read(path: Path, trial: Trial) -> Finished:
    try:
        document = json.loads((path / _OUTCOME).read_bytes())
        outcome = Outcome(
            name=trial.name,
            losses=tuple((step, loss) for step, loss in document["losses"]),
            validations=tuple((step, loss) for step, loss in document["validations"]),
            best=None if document["best"] is None else (document["best"][0], document["best"][1]),
            row_losses=tuple(document["row_losses"]),
            row_weights=tuple(document["row_weights"]),
            ended=document["ended"],
            failed=document["failed"],
        )
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise LoraportError(
            f"{path}: expected what loraport wrote, got {error!r}; remove this directory to train "
            "the candidate again"
        ) from error
    return Finished(trial, outcome, read_peft(path) if (path / WEIGHTS_FILE).exists() else None)
