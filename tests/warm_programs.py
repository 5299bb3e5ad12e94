"""``python -m loraport`` and other programs, as forks of one process that has their imports done.

What starts is a process like any other: it has a number, takes signals, can be killed and has an
exit code. The imports of training alone take longer than a tiny model does. What scripts export
runs apart as in tests, see `warm_modules.py`.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest

_IMPORTED = (
    "loraport.cli.train",
    "loraport.training.text",
    "loraport.training.run.curve",
    "loraport.cli.sweep",
    "loraport.sweep.run",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
)


class WarmProgram:
    """A program that runs in a session of its own, or has ended.

    Args:
        arguments: Of ``loraport``, or of a script.
        directory: Gets the files that what it prints goes to.
        script: Runs instead of ``loraport``.
        environment: All its variables; this process's where none are given.
        log: Gets all that it prints, in place of the files in ``directory``.
    """

    def __init__(
        self,
        arguments: Sequence[object],
        directory: Path,
        *,
        script: Path | None = None,
        environment: Mapping[str, str] | None = None,
        log: Path | None = None,
    ) -> None:
        self._out, self._err = log or directory / "stdout.log", log or directory / "stderr.log"
        for file in (self._out, self._err):
            file.write_text("")  # what another program printed there is not this one's
        words = [str(script or "loraport"), *map(str, arguments)]
        files = [str(self._out), str(self._err)]
        variables = dict(os.environ if environment is None else environment)
        target: Any = (words, script is not None, files, variables)
        self._process = _context().Process(target=_become, args=target)
        self._process.start()
        self.pid = self._process.pid

    @property
    def stdout(self) -> str:
        """What it has printed to stdout so far."""
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        """What it has printed to stderr so far."""
        return self._err.read_text()

    def poll(self) -> int | None:
        """Return the exit code, the negative number of a signal; ``None`` while it runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it, if it has not ended."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def wait(self, seconds: float | None = None) -> int | None:
        """Return the exit code once it has ended; ``None`` if it runs longer than ``seconds``."""
        self._process.join(seconds)
        return self._process.exitcode


def run_program(arguments: Sequence[object], directory: Path, **more: Any) -> WarmProgram:
    """Run a program to its end."""
    program = WarmProgram(arguments, directory, **more)
    program.wait()
    return program


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*_IMPORTED])
    with pytest.MonkeyPatch.context() as patch:
        # Read at the start, and only then: models this small lose by more.
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        forkserver.ensure_running()
    return context


def _become(words: list[str], script: bool, files: list[str], environment: dict[str, str]) -> None:
    """Run a program in this process."""
    import runpy

    from warm_modules import warm_exports

    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.setsid()
    os.nice(5)  # what watches it, to stop it in time, comes first
    sys.argv = words
    try:
        if script:
            sys.path.insert(0, str(Path(words[0]).parent))
            with warm_exports():
                runpy.run_path(words[0], run_name="__main__")
        else:
            runpy.run_module("loraport", run_name="__main__")
    finally:
        # As an interpreter that is about to end: what comes too late changes no exit code.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
