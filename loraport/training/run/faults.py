"""Say in one sentence what stopped a run, and what to change."""

from __future__ import annotations

import errno
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from loraport.errors import LoraportError, first_names
from loraport.training.run.checkpoints import last_checkpoint

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_HOST_MEMORY = "can't allocate memory"  # how torch's allocator on the CPU says it
_LINES_SHOWN = 16


class MemoryRanOutError(LoraportError):
    """Memory ran out; whoever knows the options adds what to change."""


class NotFiniteError(LoraportError):
    """A loss or a gradient became NaN or infinite.

    Args:
        found: Which, at what step and in which rows.
        remedy: What to do, and what is kept.
    """

    def __init__(self, found: str, remedy: str) -> None:
        super().__init__(f"{found}; {remedy}")
        self.found = found


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error means that a device's or the host's memory ran out."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError)
        and (_NO_HOST_MEMORY in str(error) or "CUDA error: out of memory" in str(error))
    )


@contextmanager
def faults_explained(doing: Callable[[], str], remains: Callable[[], str]) -> Iterator[None]:
    """Turn a lack of memory or disk space into an error that says what is kept.

    Args:
        doing: What was being done, asked for when it fails.
        remains: What is kept, asked for when it fails.

    Raises:
        MemoryRanOutError: If memory ran out.
        LoraportError: If the disk is full.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        # Not chained: the traceback would keep alive the tensors that did not fit.
        raise MemoryRanOutError(f"{doing()}: out of memory{_size(error)}; {remains()}") from None
    except OSError as error:
        if error.errno not in _DISK_FULL:
            raise
        where = error.filename or "the disk"
        raise LoraportError(
            f"{doing()}: expected space to write to {where}, got: {error.strerror}; {remains()}; "
            "free some space and continue with --resume"
        ) from error


def _size(error: BaseException) -> str:
    """Return what was asked for, as far as the allocator says it."""
    for line in str(error).splitlines():
        at = line.lower().find("tried to allocate")
        if at >= 0:
            return f" ({line[at:].split('. ')[0].rstrip('.')})"
    return ""


def kept(work: Path | None) -> str:
    """Say which checkpoint is there."""
    found = last_checkpoint(work) if work else None
    return f"the last checkpoint is kept: {found}" if found else "there is no checkpoint yet"


def require_finite(
    value: float, what: str, step: int, group: Sequence[Any], work: Path | None
) -> None:
    """Refuse to go on with a number that is NaN or infinite.

    Args:
        value: The number.
        what: Its name.
        step: The step it is of, which has changed nothing yet.
        group: The step's batches; those with ``lines`` are named by them.
        work: Directory of the run's checkpoints.

    Raises:
        NotFiniteError: If it is not finite.
    """
    if math.isfinite(value):
        return
    raise NotFiniteError(
        f"step {step}: expected a finite {what}, got {value}{data_lines(group)}",
        f"lower the learning rate or look at these rows; {kept(work)}",
    )


def require_finite_validation(value: float, step: int, work: Path | None) -> None:
    """Refuse to go on, or to end, with a validation loss that is NaN or infinite.

    Args:
        value: The loss.
        step: The step after which it was taken.
        work: Directory of the run's checkpoints.

    Raises:
        NotFiniteError: If it is not finite.
    """
    if math.isfinite(value):
        return
    remedy = "lower the learning rate" if step else "look at the base, of which alone it is"
    raise NotFiniteError(
        f"step {step}: expected a finite validation loss, got {value}", f"{remedy}; {kept(work)}"
    )


def data_lines(group: Sequence[Any]) -> str:
    """Name the lines of the data file that a step's batches are of, as far as they are known."""
    lines = sorted(line for batch in group for line in getattr(batch, "lines", ()))
    if not lines:
        return ""
    return f" in the batch of data lines {first_names(map(str, lines), _LINES_SHOWN)}"
