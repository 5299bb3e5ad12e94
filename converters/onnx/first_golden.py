"""The first golden outputs of a model that somebody else exported, where it can be run here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from converters.onnx.trial_run import ends_the_process
from loraport.bundle.golden import record_no_golden, write_base_golden
from loraport.bundle.manifest import MODEL_FILE
from loraport.errors import LoraportError

if TYPE_CHECKING:
    import numpy as np

# The session holds the weights, some of them twice.
_MEMORY_PER_WEIGHT_BYTE = 1.5


def record_first_golden(
    bundle: Path,
    examples: Sequence[Mapping[str, np.ndarray]],
    weights: int,
    progress: Callable[[str], None],
    *,
    careful: bool = False,
) -> None:
    """Record the base's outputs for the first inputs that the graph takes; else say why not.

    Args:
        bundle: The bundle, with its manifest.
        examples: Inputs to try, one after the other.
        weights: Bytes of the graph's weights.
        progress: Told why there are none.
        careful: Try each in a process of its own first, which the graph may end.
    """
    available = _available_memory()
    if available is not None and weights * _MEMORY_PER_WEIGHT_BYTE > available:
        reason = (
            f"the weights take {weights / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory "
            "are free"
        )
    else:
        reason = "give --input NAME=FILE.npy: ONNX Runtime refused the inputs that were made"
        for inputs in examples:
            if careful and ends_the_process(bundle / MODEL_FILE, inputs):
                reason = (
                    "give --input NAME=FILE.npy for inputs that the model takes: with those that "
                    "were made ONNX Runtime ends the process"
                )
                continue
            try:
                write_base_golden(bundle, inputs)
            except LoraportError as error:
                first = str(error).splitlines()[-1]
                reason = f"give --input NAME=FILE.npy for inputs that the model takes: {first}"
            else:
                return
    progress(f"no golden outputs: {reason}")
    record_no_golden(bundle, reason)


def _available_memory() -> int | None:
    """Return how many bytes of memory are free, where the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if "MemAvailable" in line)
    except (OSError, StopIteration, ValueError, IndexError):
        return None
