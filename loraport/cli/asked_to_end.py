"""End a command that is asked to end as Ctrl-C ends it: nothing half-written stays behind."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = ("SIGTERM", "SIGHUP")  # Windows has no SIGHUP


class AskedToEndError(KeyboardInterrupt):
    """A signal asked the process to end.

    Args:
        signal_number: The signal.
    """

    def __init__(self, signal_number: int) -> None:
        self.signal_number = signal_number
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")


@contextmanager
def interrupted_by_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP interrupt what runs, so that it cleans up; a second one kills.

    Outside of the main thread, and for a signal that the process was started to ignore (nohup) or
    that somebody else takes, nothing changes.

    Raises:
        AskedToEndError: When one comes.
    """

    def receive(number: int, frame: FrameType | None) -> None:
        del frame
        signal.signal(number, signal.SIG_DFL)
        raise AskedToEndError(number)

    taken = []
    if threading.current_thread() is threading.main_thread():
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) == signal.SIG_DFL:
                signal.signal(number, receive)
                taken.append(number)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
