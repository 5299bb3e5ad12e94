"""Run the command line inside the test's own process."""

from __future__ import annotations

import contextlib
import io

from loraport.cli import main


def command(*arguments: object) -> tuple[int, str]:
    """Return the exit code, and all that was printed with runs of blanks made one."""
    said = io.StringIO()
    code: object = 0
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    return int(str(code or 0)), " ".join(said.getvalue().split())
