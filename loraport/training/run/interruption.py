"""Stop a run between two steps when the process is asked to end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP
_SIGNALS = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]


class Stopped(KeyboardInterrupt):
    """A run ended early because a signal asked for it; what it learned is in a checkpoint.

    Args:
        signal_number: SIGINT, SIGTERM or SIGHUP.
        step: Steps taken.
        checkpoint: Where they are kept; ``None`` where the run was stopped at once.
    """

    def __init__(self, signal_number: int, step: int = 0, checkpoint: Path | None = None) -> None:
        self.signal_number = signal_number
        self.step = step
        self.checkpoint = checkpoint
        kept = f" after step {step}; {checkpoint} is kept" if checkpoint else ""
        super().__init__(f"stopped by {signal.Signals(signal_number).name}{kept}")


@dataclass
class StopRequest:
    """Whether a run has been asked to stop.

    Attributes:
        signal_number: The signal received, or ``None``.
    """

    signal_number: int | None = None


@contextmanager
def stop_requests(*, active: bool = True) -> Iterator[StopRequest]:
    """Take SIGINT, SIGTERM and SIGHUP as a request to stop at the next chance.

    A second one stops at once.

    Outside of the main thread, and for a signal that the process was started to ignore, nothing
    changes.

    Args:
        active: Otherwise signals do what they did before.

    Raises:
        Stopped: At the second signal.
    """
    request = StopRequest()

    def receive(number: int, frame: FrameType | None) -> None:
        del frame
        if request.signal_number is not None:
            raise Stopped(number)
        request.signal_number = number

    previous = {}
    if active and threading.current_thread() is threading.main_thread():
        for number in _SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                previous[number] = signal.signal(number, receive)
    try:
        yield request
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
