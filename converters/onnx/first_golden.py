"""The first golden outputs of a model that somebody else exported, where it can be run here."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.onnx.trial_run import TrialRuns
from loraport.bundle.golden import record_no_golden
from loraport.bundle.manifest import MODEL_FILE, read_manifest
from loraport.errors import LoraportError, first_line
from loraport.free_memory import free_memory
from loraport.runtime.recording import NotRecordedError, write_base_golden
from loraport.runtime.session import open_session

if TYPE_CHECKING:
    import numpy as np

# The session holds the weights, some of them twice; those in halves in float32 as well.
_MEMORY_PER_WEIGHT_BYTE = {"fp16": 3.0}
_MOST_OFTEN = 1.5


def record_first_golden(
    bundle: Path,
    file: Path,
    examples: Sequence[Mapping[str, np.ndarray]],
    weights: int,
    progress: Callable[[str], None],
    *,
    careful: bool = False,
) -> None:
    """Record the base's outputs for the first inputs that the graph takes; else say why not.

    Args:
        bundle: The bundle, with its manifest.
        file: The model that it was made of.
        examples: Inputs to try, one after the other.
        weights: Bytes of the graph's weights.
        progress: Told why there are none.
        careful: Try each in a process of its own first, which the graph may end.

    Raises:
        LoraportError: If ONNX Runtime opens or runs the model, but not what was made of it.
    """
    available = free_memory()
    needed = weights * _MEMORY_PER_WEIGHT_BYTE.get(read_manifest(bundle).precision, _MOST_OFTEN)
    if available is not None and needed > available:
        reason = (
            f"the weights take {weights / 1e9:.1f} GB, and {available / 1e9:.1f} GB of memory "
            "are free"
        )
    else:
        with TrialRuns() as trials:
            found = _why_not_recorded(bundle, file, examples, trials if careful else None)
        if found is None:
            return
        reason = found
    progress(f"no golden outputs: {reason}")
    record_no_golden(bundle, reason)


def _why_not_recorded(
    bundle: Path,
    file: Path,
    examples: Sequence[Mapping[str, np.ndarray]],
    trials: TrialRuns | None,
) -> str | None:
    """Record the base's outputs for the first inputs that the graph takes; else return why not."""
    reason = "give --input NAME=FILE.npy: ONNX Runtime refused the inputs that were made"
    for inputs in examples:
        if trials is not None and trials.end_the_process(bundle / MODEL_FILE, inputs):
            reason = (
                "give --input NAME=FILE.npy for inputs that the model takes: with those that "
                "were made ONNX Runtime ends the process"
            )
            continue
        try:
            write_base_golden(bundle, inputs)
        except NotRecordedError as error:
            return str(error)
        except LoraportError as error:
            first = str(error).splitlines()[-1]
            if trials is None or not trials.end_the_process(file, inputs):
                own = _refusal_of_its_own(bundle, file, inputs)
                if own is not None and not own.opened:
                    return f"ONNX Runtime does not open {file.name} itself: {own.reason}"
            reason = f"give --input NAME=FILE.npy for inputs that the model takes: {first}"
        else:
            return None
    return reason


@dataclass(frozen=True)
class _Refusal:
    """Why ONNX Runtime does not run a graph.

    Attributes:
        reason: In its words.
        opened: It is the inputs that it refuses.
    """

    reason: str
    opened: bool


def _refusal_of_its_own(
    bundle: Path, source: Path, inputs: Mapping[str, np.ndarray]
) -> _Refusal | None:
    """Return why the graph that a bundle was made of is not run, where the bundle's is not.

    Raises:
        LoraportError: If it is run.
    """
    precision = read_manifest(bundle).precision
    made = _refusal(bundle / MODEL_FILE, precision, inputs)
    if made is None:
        return None
    own = _refusal(source, precision, inputs)
    if own is None:
        raise LoraportError(
            f"{source.name}: ONNX Runtime runs it, but not with these slots and in this "
            f"precision: {made.reason}; export it in a newer opset, or with fewer options"
        )
    return own


def _refusal(file: Path, precision: str, inputs: Mapping[str, np.ndarray]) -> _Refusal | None:
    """Return why ONNX Runtime does not run a graph with these inputs; nothing if it does."""
    try:
        session = open_session(file, precision=precision)
    except LoraportError as error:
        first = str(error).splitlines()[0].partition("cannot open it: ")[2] or str(error)
        return _Refusal(re.sub(r"Load model from .+? failed: ?", "", first), opened=False)
    try:
        session.run(None, inputs)
    except Exception as error:  # onnxruntime raises classes of its own without a common base
        return _Refusal(first_line(error), opened=True)
    return None
