"""Timing of things that are compared with each other: in turns, so that what else the machine does
falls on all of them alike."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
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


def child(script: str, *arguments: str) -> Any:
    """Run a benchmark as a process of its own; return what its last line says in JSON."""
    command = [sys.executable, script, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise SystemExit(f"{' '.join(arguments)}: {lines[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def share_threads() -> None:
    """Let all sessions that this process opens from now on share one pool of threads."""
    import onnxruntime

    class Sharing(onnxruntime.SessionOptions):
        def __init__(self) -> None:
            super().__init__()
            self.use_per_session_threads = False

    onnxruntime.set_global_thread_pool_sizes(0, 1)  # of threads inside operators as usual
    onnxruntime.SessionOptions = Sharing


def print_turns(heading: str, rounds: list[Mapping[str, list[float]]], reference: str) -> None:
    """Print each title's median milliseconds and ratio, where rounds hold the seconds of turns.

    A round's ratio is the median over its turns; of the rounds' ratios the median is printed, and
    the quartiles beside it.
    """
    ratios: list[Mapping[str, float]] = []
    for one in rounds:
        own = one[reference]
        within = {
            title: statistics.median(a / b for a, b in zip(times, own, strict=True))
            for title, times in one.items()
        }
        scale = statistics.median(own)
        ratios.append({title: scale * ratio for title, ratio in within.items()})
    print_ratios(heading, ratios, reference)


def print_ratios(
    heading: str, rounds: list[Mapping[str, float]], reference: str, digits: int = 2
) -> None:
    """Print each title's median milliseconds, and the median of its ratios within a round.

    Quartiles of the ratios stand beside, where there are several rounds.
    """
    width = max(len(heading), *(len(title) for title in rounds[0]))
    print(f"{heading:{width}} {'ms':>9} {'ratio':>7}")
    for title in rounds[0]:
        times = [one[title] for one in rounds]
        ratios = [one[title] / one[reference] for one in rounds]
        spread = ""
        if len(rounds) > 1 and title != reference:
            low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
            spread = f"  ({low:.3f} to {high:.3f})"
        print(
            f"{title:{width}} {1e3 * statistics.median(times):9.{digits}f} "
            f"{statistics.median(ratios):7.3f}{spread}"
        )
