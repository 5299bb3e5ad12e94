"""Sessions of which runs are captured and repeated: CUDA graphs.

A decoding step is hundreds of small kernels, and a GPU waits for the host to launch each; a graph
of them is launched as one. What is repeated reads and writes the memory that it was captured with,
so everything that it takes and gives is allocated once, outside the session: what ONNX Runtime
allocates within a run is free after it, and a repeated run writes there again.

Source: ONNX Runtime, "CUDA Execution Provider", Using CUDA Graphs; run option ``gpu_graph_id``.
"""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

NOT_CAPTURED = -1
_MOST = 256  # graphs: a session keeps every one until it is closed


class CapturingSession:
    """An ``onnxruntime.InferenceSession`` that captures the runs that have a number.

    One run at a time: while one is captured no other may use the GPU's allocator.

    Args:
        session: One of CUDA that was opened for it; on others every run is an ordinary one.

    Attributes:
        spare: By size: what runs were captured over, and nothing uses at present.
    """

    def __init__(self, session: Any) -> None:
        self._session = session
        self._lock = threading.Lock()
        self._numbers = itertools.count(1)
        self.spare: defaultdict[int, list[Any]] = defaultdict(list)

    def new_number(self) -> int:
        """Return a number for a run that is to be repeated, or that of runs that are not."""
        number = next(self._numbers)
        return number if number <= _MOST else NOT_CAPTURED

    def run_with_iobinding(self, binding: Any, number: int = NOT_CAPTURED) -> None:
        """Run what is bound.

        Args:
            binding: Of `io_binding`. With a number, the same one every time, with the same
                values on the GPU: these are what a repeated run reads and writes.
            number: What `new_number` gave; runs that have none are not captured.
        """
        with self._lock:
            self._session.run_with_iobinding(binding, _options(number))

    def run(self, outputs: Sequence[str] | None, inputs: Mapping[str, np.ndarray]) -> list[Any]:
        """Run with arrays; not captured."""
        with self._lock:
            found: list[Any] = self._session.run(outputs, inputs, _options(NOT_CAPTURED))
        return found

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


def _options(number: int) -> Any:
    import onnxruntime

    options = onnxruntime.RunOptions()
    options.log_severity_level = 4  # what goes wrong is raised
    options.add_run_config_entry("gpu_graph_id", str(number))
    return options
