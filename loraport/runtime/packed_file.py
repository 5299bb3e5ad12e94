"""Read a packed adapter whole: its tensors are parts of one stretch of memory.

A packed adapter is hundreds of small tensors that are all wanted at once. Opening the file for each
of them takes ten times as long as reading it. Where its content is to be compared with a hash, that
is of the bytes that are used.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from io import BufferedReader
from pathlib import Path
from threading import Lock

import numpy as np

from loraport.base.checkpoint import NUMPY_DTYPES, TensorInfo, read_open_header
from loraport.bundle.content_hash import ContentHash, Digest
from loraport.errors import LoraportError, Problems

_ALIGNMENT = 64  # what vector instructions like, and ONNX Runtime's own allocator gives
_LEAST_PART = 8 << 20  # less is not worth a thread


def read_whole(file: Path, expected: ContentHash | None = None) -> dict[str, np.ndarray]:
    """Return all tensors of a ``.safetensors`` file, in its order.

    The file is read, not mapped: it may be replaced or cut short while a session uses them. It is
    opened once: where another takes its name meanwhile, all is of the one that was opened.

    Args:
        file: The file.
        expected: What its content must hash to, if that is known.

    Raises:
        LoraportError: If the file is damaged, cannot be read, is another one than the hash says,
            or holds dtypes unknown to numpy.
    """
    digest = None if expected is None else expected.digest()
    try:
        with file.open("rb") as stream:
            infos, _ = read_open_header(stream, file)
            problems = Problems()
            for name, info in infos.items():
                if info.dtype not in NUMPY_DTYPES:
                    problems.add(name, f"one of the dtypes {', '.join(NUMPY_DTYPES)}", info.dtype)
            problems.raise_if_any("it cannot be read")
            content = _read(stream, infos.values(), digest)
    except LoraportError as error:
        raise LoraportError(f"{file}: {error}") from error
    except OSError as error:
        raise LoraportError(f"{file}: cannot be read: {error.strerror or error}") from error
    if expected is not None and digest is not None and digest.hexdigest() != expected.digits:
        raise LoraportError(
            f"{file}: expected {expected}, got {digest.hexdigest()[:12]}; copy it again"
        )
    return {
        name: info.array(content[info.start : info.start + info.nbytes])
        for name, info in infos.items()
    }


def _read(
    stream: BufferedReader, infos: Collection[TensorInfo], digest: Digest | None
) -> np.ndarray:
    """Read a file, its tensors from an aligned address on, several parts of it at once."""
    start = min((info.start for info in infos), default=0)
    size = max(
        (info.start + info.nbytes for info in infos), default=os.fstat(stream.fileno()).st_size
    )
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -(memory.ctypes.data + start) % _ALIGNMENT
    memory = memory[first : first + size]
    part = max(-(-size // (os.cpu_count() or 1)), _LEAST_PART)
    moving = Lock()

    def read_part(begin: int) -> int:
        stop = min(begin + part, size)
        reached = begin
        while reached < stop and (count := read_at(reached, memory.data[reached:stop])):
            reached += count
        return reached - begin

    def read_at(position: int, room: memoryview) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(stream.fileno(), [room], position)
        with moving:  # Windows has no reads at a position
            stream.seek(position)
            return stream.readinto(room)

    begins = range(0, size, part)
    reached = 0
    with ThreadPoolExecutor(len(begins) or 1) as threads:
        for begin, count in zip(begins, threads.map(read_part, begins), strict=True):
            if digest:
                digest.update(memory.data[begin : begin + count])
            reached += count
    if reached != size:
        raise LoraportError(f"expected {size} bytes, got {reached}; it changed while being read")
    return memory
