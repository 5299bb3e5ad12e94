"""The record of a run: one JSON line per step and per validation."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from loraport.errors import LoraportError
from loraport.output import naming

METRICS_FILE = "metrics.jsonl"


class MetricsLog:
    """Lines kept in memory and, where there is a directory, in its ``metrics.jsonl``.

    No line holds a time, so a run that was stopped and resumed leaves the same file as one
    that was not.

    Args:
        directory: Where the file is, or ``None``.
        length: Bytes of an existing file to keep; the rest belongs to steps that a resumed run
            takes again.

    Raises:
        LoraportError: If these bytes are not there or are damaged.
    """

    def __init__(self, directory: Path | None, length: int = 0) -> None:
        self.lines: list[dict[str, Any]] = []
        self._file = None
        if directory is None:
            return
        self._path = directory / METRICS_FILE
        if length:
            self.lines = _written(self._path, length)
            os.truncate(self._path, length)
        self._file = self._path.open("ab" if length else "wb")

    def add(self, **line: Any) -> None:
        """Record one line; a number that is not finite is ``null`` in the file (JSON has none)."""
        self.lines.append(line)
        if self._file is not None:
            plain = {key: value if math.isfinite(value) else None for key, value in line.items()}
            with naming(self._path):
                self._file.write(json.dumps(plain).encode() + b"\n")
                self._file.flush()

    def sync(self) -> int:
        """Make sure that all lines are on disk and return the file's length."""
        if self._file is None:
            return 0
        with naming(self._path):
            os.fsync(self._file.fileno())
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            with naming(self._path):  # what found no room is tried once more
                self._file.close()

    def losses(self) -> list[tuple[int, float]]:
        """Return step and loss of every step."""
        return [(line["step"], line["loss"]) for line in self.lines if "loss" in line]

    def validations(self) -> list[tuple[int, float]]:
        """Return step and validation loss of every validation; step 0 is the base."""
        return [
            (line["step"], line["validation_loss"])
            for line in self.lines
            if "validation_loss" in line
        ]


def _written(path: Path, length: int) -> list[dict[str, Any]]:
    """Return the lines that a run has written when its file was ``length`` bytes long."""
    lines = []
    try:
        kept = path.read_bytes()[:length]
        if len(kept) < length:
            raise ValueError(f"{len(kept)} bytes of {length}")
        for number, text in enumerate(kept.splitlines(), start=1):
            line = json.loads(text)
            if "step" not in line or not all(
                isinstance(v, int | float) or (v is None and k == "validation_loss")
                for k, v in line.items()
            ):
                raise ValueError(f"another line {number}")
            lines.append({k: math.nan if v is None else v for k, v in line.items()})
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise LoraportError(
            f"{path}: expected what the run wrote before its checkpoint, got: {error}; put the "
            "file back, or start again with --force"
        ) from error
    return lines
