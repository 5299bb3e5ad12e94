"""Timing of things that are compared with each other: in turns, so that what else the machine does
falls on all of them alike."""

import statistics
import time
from collections.abc import Callable
from typing import Any


def medians(count: int, *actions: Callable[[], Any], warm: int = 2) -> list[float]:
    """Return the median seconds of actions, run in turns ``count`` times after warming up.

    An action runs once untimed before it is timed: the threads of a session go on spinning for a
    while after a run, and would take the processor from the next session in turn.
    """
    for _ in range(warm):
        for action in actions:
            action()
    found: list[list[float]] = [[] for _ in actions]
    for _ in range(count):
        for times, action in zip(found, actions, strict=True):
            action()
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in found]
