"""``python -m MODULE`` of what exports run apart, as forks of one process that has it imported.

Their imports take far longer than a tiny model. Programs that tests start themselves, such as
``python -m loraport export``, start theirs as users' do.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MODULES = (
    "onnxruntime_genai.models.builder",
    "converters.onnx.exporters.mended_builder",
    "converters.onnx.exporters.quantizing",
)


class WarmModules:
    """Stands for ``subprocess``, as far as its `run` is called with a command of `MODULES`."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(self, command, *, capture_output, text, check):
        """Run such a command to its end; the answer is that of `subprocess.run`."""
        python, option, module, *arguments = command
        assert (python, option, capture_output, text, check) == (
            sys.executable, "-m", True, True, False,
        )  # fmt: skip
        assert module in MODULES
        with tempfile.TemporaryDirectory() as directory:
            said = [str(Path(directory) / name) for name in ("stdout", "stderr")]
            code = self._ask([module, arguments, said, os.getcwd(), dict(os.environ)])
            stdout, stderr = (Path(file).read_text() for file in said)
        return subprocess.CompletedProcess(command, code, stdout, stderr)

    def _ask(self, request: list[object]) -> int:
        if self._server is None:
            command = [sys.executable, "-W", "ignore", __file__]
            pipe = subprocess.PIPE
            self._server = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True)
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def close(self) -> None:
        """End the process."""
        if self._server is not None:
            self._server.communicate()


@contextmanager
def warm_exports() -> Iterator[None]:
    """Let the exports of this process run what they run apart in a `WarmModules`."""
    import pytest

    from converters.onnx.exporters import genai_builder, quantizing

    warm = WarmModules()
    with pytest.MonkeyPatch.context() as patch:
        for module in (genai_builder, quantizing):
            patch.setattr(module, "subprocess", warm)
        try:
            yield
        finally:
            warm.close()


def _serve() -> None:
    import contextlib
    import importlib

    for module in MODULES:
        with contextlib.suppress(ImportError):  # an extra that is not there: told when it is run
            importlib.import_module(module)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become(*json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _become(module, arguments, said, directory, environment) -> None:
    """Run a module as the interpreter's own main program; does not return."""
    import runpy
    import traceback

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, file in enumerate(said, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [module, *arguments]
    code = 0
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _serve()
