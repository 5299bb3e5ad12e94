"""Read a packed adapter whole: its tensors are parts of one stretch of memory.

A packed adapter is hundreds of small tensors that are all wanted at once. Opening the file for each
of them takes ten times as long as reading it.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loraport.checkpoint import Checkpoint
from loraport.errors import LoraportError, Problems

if TYPE_CHECKING:
    import torch

_ALIGNMENT = 64  # what vector instructions like, and ONNX Runtime's own allocator gives
_LEAST_PART = 8 << 20  # less is not worth a thread
# The safetensors format's names for dtypes, and torch's.
_TORCH = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "I8": "int8",
    "U8": "uint8",
    "BOOL": "bool",
}


def read_whole(file: Path) -> dict[str, torch.Tensor]:
    """Return all tensors of a ``.safetensors`` file, in its order.

    The file is read, not mapped: it may be replaced or cut short while a session uses them.

    Raises:
        LoraportError: If the file is damaged, cannot be read, or holds dtypes unknown to torch.
    """
    import torch

    checkpoint = Checkpoint(file)
    infos = {name: checkpoint.info(name) for name in checkpoint}
    problems = Problems()
    for name, info in infos.items():
        if info.dtype not in _TORCH:
            problems.add(name, f"one of the dtypes {', '.join(_TORCH)}", info.dtype)
    problems.raise_if_any(f"{file} cannot be read")
    start = min((info.start for info in infos.values()), default=0)
    memory = _read(file, start, sum(info.nbytes for info in infos.values()))
    tensors = {}
    for name, info in infos.items():
        dtype = getattr(torch, _TORCH[info.dtype])
        if info.nbytes == 0:  # which torch takes from no memory
            tensors[name] = torch.empty(info.shape, dtype=dtype)
            continue
        flat = torch.frombuffer(
            memory, dtype=dtype, count=math.prod(info.shape), offset=info.start - start
        )
        tensors[name] = flat.view(info.shape)
    return tensors


def _read(file: Path, start: int, size: int) -> np.ndarray:
    """Read a stretch of a file to an aligned address, several parts of it at once."""
    memory = np.empty(size + _ALIGNMENT, np.uint8)
    first = -memory.ctypes.data % _ALIGNMENT
    memory = memory[first : first + size]
    part = max(-(-size // (os.cpu_count() or 1)), _LEAST_PART)

    def read_part(begin: int) -> int:
        stop = min(begin + part, size)
        reached = begin
        with file.open("rb", buffering=0) as stream:
            stream.seek(start + begin)
            while reached < stop and (count := stream.readinto(memory.data[reached:stop])):
                reached += count
        return reached - begin

    begins = range(0, size, part)
    try:
        if len(begins) > 1:
            with ThreadPoolExecutor(len(begins)) as threads:
                reached = sum(threads.map(read_part, begins))
        else:
            reached = sum(map(read_part, begins))
    except OSError as error:
        raise LoraportError(f"{file}: cannot be read: {error.strerror or error}") from error
    if reached != size:
        raise LoraportError(
            f"{file}: expected {size} bytes of tensors, got {reached}; it changed while being read"
        )
    return memory
