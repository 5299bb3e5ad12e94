"""The side of a spread sweep that runs in another process, perhaps on another machine."""

from __future__ import annotations

import platform
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraport import __version__
from loraport.fingerprint import BaseFingerprint
from loraport.sweep.observer import SilentSweep
from loraport.sweep.trial import Trial
from loraport.sweep.worker import Setting, Trained, Worker

# The name of an observer's method, and its keyword arguments.
Event = tuple[str, Mapping[str, Any]]

_EVENTS = ("group_started", "stepped", "validated", "ended", "note")


@dataclass(frozen=True)
class Loaded:
    """What a worker has in memory.

    Attributes:
        machine: Its name.
        version: Of loraport there.
        weights: A hash of every tensor of the base.
    """

    machine: str
    version: str
    weights: BaseFingerprint


class RemoteWorker:
    """A `Worker` in a process that Ray started; two threads of it are called.

    Args:
        shared: What a `Worker` takes.
    """

    def __init__(self, shared: tuple[Setting, Sequence[Trial]]) -> None:
        self._shared = shared
        self._told: list[Event] = []
        self._lock = threading.Lock()
        self._worker: Worker | None = None

    def load(self) -> Loaded:
        """Load the base, and say what it is.

        Raises:
            LoraportError: As `Worker`.
        """
        self._worker = Worker(*self._shared, _Teller(self._tell))
        return Loaded(platform.node(), __version__, self._worker.base_fingerprint())

    def train(
        self, group: Sequence[Trial], until: float, starts: Mapping[str, Trained]
    ) -> tuple[list[Trained], list[Event]]:
        """Train candidates; return them and what was told since `told` was last called.

        Raises:
            LoraportError: As `Worker.train`.
        """
        assert self._worker is not None
        found = self._worker.train(group, until, starts)
        return found, self.told()

    def told(self) -> list[Event]:
        """Return what happened since the last call, in its order; while another thread trains."""
        with self._lock:
            told, self._told = self._told, []
        return told

    def _tell(self, event: Event) -> None:
        with self._lock:
            self._told.append(event)


class _Teller(SilentSweep):
    """An observer that hands on what it is told."""

    def __init__(self, tell: Callable[[Event], None]) -> None:
        for name in _EVENTS:
            setattr(self, name, _handing_on(name, tell))


def _handing_on(name: str, tell: Callable[[Event], None]) -> Callable[..., None]:
    def hand_on(text: str | None = None, **told: Any) -> None:
        tell((name, told if text is None else {"text": text}))

    return hand_on
