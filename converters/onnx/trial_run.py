"""Run a graph in a process of its own, which it may end.

ONNX Runtime 1.31 divides by the length that ``Scan`` goes over; where inputs make that zero the
processor stops the process, and there is no error to catch. Inputs that were made for a graph from
elsewhere are tried here first where it has such an operator.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Self

import numpy as np
import onnx_ir as ir

_REFUSED = 1


def may_end_the_process(model: ir.Model) -> bool:
    """Tell whether a graph scans anything."""
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return any(node.op_type == "Scan" for node in nodes)


class TrialRuns:
    """A process for runs that may end it; it is started at the first, and again after such a one.

    It keeps no graph open between them. Use it in a ``with`` statement, which ends it.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._end()

    def end_the_process(self, model: Path, inputs: Mapping[str, np.ndarray]) -> bool:
        """Tell whether a run of a graph ends its process; not whether it is refused.

        Args:
            model: The ``.onnx`` file.
            inputs: Every input; none, to have it opened alone.
        """
        if self._process is None:
            # This file alone, without the package: -P keeps its neighbours from being imported.
            command = [sys.executable, "-P", __file__]
            pipe, nowhere = subprocess.PIPE, subprocess.DEVNULL
            self._process = subprocess.Popen(
                command, bufsize=0, stdin=pipe, stdout=pipe, stderr=nowhere
            )
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "inputs.npz"
            # Names are no file names: they are numbered.
            np.savez(file, *inputs.values(), names=np.array(list(inputs), dtype=np.str_))
            with suppress(BrokenPipeError):  # it has ended already: there is no answer either
                process.stdin.write(json.dumps([str(model.resolve()), str(file)]).encode() + b"\n")
            answered = bool(process.stdout.readline())
        return not answered and self._end() not in (0, _REFUSED)

    def _end(self) -> int:
        """End the process, if there is one, and return its exit status."""
        process, self._process = self._process, None
        if process is None:
            return 0
        with process:  # closes its input, which it reads to the end
            pass
        return process.returncode


def _run(model: str, file: str) -> None:
    """Run a graph, or be refused."""
    import onnxruntime

    with np.load(file, allow_pickle=False) as stored:
        names = [str(name) for name in stored["names"]]
        inputs = {name: stored[f"arr_{number}"] for number, name in enumerate(names)}
    # onnxruntime raises classes of its own without a common base.
    with suppress(Exception):
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        session.run(None, inputs)


def _main() -> None:
    for line in sys.stdin.buffer:
        _run(*json.loads(line))
        print("done", flush=True)


if __name__ == "__main__":
    _main()
