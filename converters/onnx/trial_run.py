"""Run a graph once in a process of its own, which it may end.

ONNX Runtime 1.31 divides by the length that ``Scan`` goes over; where inputs make that zero the
processor stops the process, and there is no error to catch. Inputs that were made for a graph from
elsewhere are tried here first where it has such an operator.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

_REFUSED = 1


def may_end_the_process(model: ir.Model) -> bool:
    """Tell whether a graph scans anything."""
    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    return any(node.op_type == "Scan" for node in nodes)


def ends_the_process(model: Path, inputs: Mapping[str, np.ndarray]) -> bool:
    """Tell whether a run of a graph ends its process; not whether it is refused.

    Args:
        model: The ``.onnx`` file.
        inputs: Every input; none, to have it opened alone.
    """
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "inputs.npz"
        # Names are no file names: they are numbered.
        np.savez(file, *inputs.values(), names=np.array(list(inputs), dtype=np.str_))
        # This file alone, without the package: -P keeps its neighbours from being imported.
        command = [sys.executable, "-P", __file__, str(model.resolve()), str(file)]
        done = subprocess.run(command, capture_output=True, check=False)
    return done.returncode not in (0, _REFUSED)


def _main(model: str, file: str) -> int:
    import onnxruntime

    with np.load(file, allow_pickle=False) as stored:
        names = [str(name) for name in stored["names"]]
        inputs = {name: stored[f"arr_{number}"] for number, name in enumerate(names)}
    try:
        session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
        session.run(None, inputs)
    except Exception:  # onnxruntime raises classes of its own without a common base
        return _REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
