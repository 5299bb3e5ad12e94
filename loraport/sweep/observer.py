"""What a sweep tells while it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol


class SweepObserver(Protocol):
    """Receives what happens; the sweep never prints."""

    def planned(self, *, groups: int, trials: int, done: int) -> None:
        """The sweep begins; ``done`` trials were finished before."""

    def group_started(self, *, names: Sequence[str], steps: int, done: int) -> None:
        """A group of candidates begins to train, or continues after ``done`` steps."""

    def stepped(self, *, step: int, losses: Mapping[str, float], tokens: int) -> None:
        """A step was taken; ``tokens`` is how many all candidates together consumed."""

    def validated(self, *, step: int, losses: Mapping[str, float]) -> None:
        """A validation was made; before the first step it is of the base alone."""

    def ended(self, *, name: str, reason: str) -> None:
        """A candidate ended before the last step."""

    def group_finished(self, *, names: Sequence[str]) -> None:
        """A group is done and on disk."""

    def note(self, text: str) -> None:
        """Something the user should know happened."""

    def finished(self) -> None:
        """The sweep ended, well or not."""


class SilentSweep:
    """Says nothing."""

    def planned(self, *, groups: int, trials: int, done: int) -> None:
        """Say nothing."""

    def group_started(self, *, names: Sequence[str], steps: int, done: int) -> None:
        """Say nothing."""

    def stepped(self, *, step: int, losses: Mapping[str, float], tokens: int) -> None:
        """Say nothing."""

    def validated(self, *, step: int, losses: Mapping[str, float]) -> None:
        """Say nothing."""

    def ended(self, *, name: str, reason: str) -> None:
        """Say nothing."""

    def group_finished(self, *, names: Sequence[str]) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def finished(self) -> None:
        """Say nothing."""
