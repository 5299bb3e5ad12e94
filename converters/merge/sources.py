"""Where the values of a tensor come from, read a stretch at a time."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from converters.merge.buffers import Buffers
from loraport.base.checkpoint import TensorInfo
from loraport.errors import LoraportError

if TYPE_CHECKING:
    import torch


class Source(Protocol):
    """Values of one tensor."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor."""
        ...

    @property
    def dtype(self) -> str:
        """The safetensors name of the dtype to write it in."""
        ...

    @property
    def stored(self) -> TensorInfo | None:
        """Where its bytes lie as they are to be written, if they do anywhere."""
        ...

    def read(self, files: OpenFiles, start: int, count: int) -> torch.Tensor:
        """Return ``count`` elements from element ``start`` on, flat, in a floating dtype.

        They may lie in memory that the same thread's next read overwrites.
        """
        ...


class OpenFiles:
    """File descriptors for reading, opened once each; safe to use from several threads."""

    def __init__(self) -> None:
        self._descriptors: dict[Path, int] = {}
        self._lock = threading.Lock()
        self._buffers = Buffers()

    def descriptor(self, file: Path) -> int:
        """Return a descriptor that reads ``file``."""
        with self._lock:
            if file not in self._descriptors:
                self._descriptors[file] = os.open(file, os.O_RDONLY)
            return self._descriptors[file]

    def close(self) -> None:
        """Close all."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, file: Path, start: int, count: int) -> torch.Tensor:
        """Read exactly ``count`` bytes, into memory that the same thread's next read reuses.

        Returns:
            uint8 ``[count]``.

        Raises:
            LoraportError: If the file has become shorter meanwhile.
        """
        import torch

        buffer = self._buffers.of(torch.uint8, count)
        view = memoryview(buffer.numpy().data)
        descriptor = self.descriptor(file)
        done = 0
        while done < count:
            read = os.preadv(descriptor, [view[done:]], start + done)
            if read == 0:
                raise LoraportError(f"{file}: expected {count} bytes at {start}, got {done}")
            done += read
        return buffer


@contextmanager
def open_files() -> Iterator[OpenFiles]:
    """Yield an empty set of files that is closed at the end."""
    files = OpenFiles()
    try:
        yield files
    finally:
        files.close()


@dataclass(frozen=True)
class StoredSource:
    """A tensor as a safetensors file stores it."""

    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Source`."""
        return self.info.shape

    @property
    def dtype(self) -> str:
        """See `Source`."""
        return self.info.dtype

    @property
    def stored(self) -> TensorInfo | None:
        """See `Source`."""
        return self.info

    def read(self, files: OpenFiles, start: int, count: int) -> torch.Tensor:
        """See `Source`."""
        dtype = torch_dtype(self.info.dtype)
        size = dtype.itemsize
        raw = files.read(self.info.file, self.info.start + start * size, count * size)
        return raw.view(dtype)


@dataclass(frozen=True, eq=False)
class GivenSource:
    """A tensor that an adapter holds whole, to be written in the base's dtype."""

    tensor: torch.Tensor
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Source`."""
        return tuple(self.tensor.shape)

    @property
    def stored(self) -> TensorInfo | None:
        """See `Source`."""
        return None

    def read(self, files: OpenFiles, start: int, count: int) -> torch.Tensor:  # noqa: ARG002
        """See `Source`."""
        return self.tensor.reshape(-1)[start : start + count]


def torch_dtype(name: str) -> torch.dtype:
    """Return torch's dtype for a dtype of safetensors that can be merged into.

    Raises:
        KeyError: If it is none.
    """
    import torch

    return {
        "F64": torch.float64,
        "F32": torch.float32,
        "F16": torch.float16,
        "BF16": torch.bfloat16,
        COUNTER: torch.int64,
    }[name]


FLOATING = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of each
COUNTER = "I64"  # what normalizations count their batches in
