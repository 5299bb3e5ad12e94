"""What the loop tells while it runs."""

from __future__ import annotations

from typing import Protocol


class Observer(Protocol):
    """Receives what happens; the loop never prints."""

    def started(self, *, steps: int, done: int) -> None:
        """Training begins, or continues after ``done`` steps."""

    def stepped(self, *, step: int, loss: float, learning_rate: float, tokens: int) -> None:
        """A step was taken; ``tokens`` is how many it consumed."""

    def validated(self, *, step: int, loss: float) -> None:
        """A validation was made; step 0 is the base alone."""

    def note(self, text: str) -> None:
        """Something the user should know happened."""

    def finished(self) -> None:
        """The loop ended, well or not."""


class Silent:
    """Says nothing."""

    def started(self, *, steps: int, done: int) -> None:
        """Say nothing."""

    def stepped(self, *, step: int, loss: float, learning_rate: float, tokens: int) -> None:
        """Say nothing."""

    def validated(self, *, step: int, loss: float) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""

    def finished(self) -> None:
        """Say nothing."""
