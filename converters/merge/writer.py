"""Write a planned merge: every byte has its place beforehand, so threads fill in blocks.

Copied tensors go from file to file inside the system, without being decoded; changed ones are
read, computed and written a block of rows at a time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from converters.merge.arithmetic import PreparedChange, merge_rows_, prepare, ungained_rows
from converters.merge.buffers import Buffers
from converters.merge.plan import MergePlan, TensorPlan
from converters.merge.rounding import round_into
from converters.merge.sources import OpenFiles, open_files, torch_dtype
from loraport.errors import LoraportError

if TYPE_CHECKING:
    import torch

Progress = Callable[[int], None]
_COPY_BYTES = 64 << 20
_VARIANCE = ".running_var"
_BLOCK_ELEMENTS = 1 << 19  # 4 MiB in float64: stays in a core's cache
_Task = Callable[[], int]


def write_shards(plan: MergePlan, directory: Path, progress: Progress, threads: int | None) -> None:
    """Write all shards of a merge.

    Args:
        plan: What to write.
        directory: An existing directory.
        progress: Told the bytes written, as they are.
        threads: How many work at once; ``None`` for as many as there are cores.

    Raises:
        OSError: If the disk is full or a file cannot be read.
    """
    import torch

    workers = threads or os.cpu_count() or 1
    before = torch.get_num_threads()
    # One thread a block: the blocks are what runs in parallel.
    torch.set_num_threads(1)
    try:
        with open_files() as files, ThreadPoolExecutor(workers) as pool:
            for name, tensors in plan.shards.items():
                (directory / name).parent.mkdir(parents=True, exist_ok=True)
                _write_shard(
                    directory / name, tensors, plan.base.metadata, files, pool, workers, progress
                )
    finally:
        torch.set_num_threads(before)


def header_bytes(tensors: tuple[TensorPlan, ...], metadata: Mapping[str, str]) -> bytes:
    """Return a safetensors header, its length in front, that ends on a multiple of 8 bytes."""
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    start = 0
    for tensor in tensors:
        end = start + tensor.nbytes
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _write_shard(
    path: Path,
    tensors: tuple[TensorPlan, ...],
    metadata: Mapping[str, str],
    files: OpenFiles,
    pool: ThreadPoolExecutor,
    workers: int,
    progress: Progress,
) -> None:
    header = header_bytes(tensors, metadata)
    output = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    running: set[Future[int]] = set()
    try:
        _write_all(output, header, 0)
        for task in _tasks(tensors, output, len(header), files):
            # A few blocks ahead at most, so that memory stays bounded.
            while len(running) >= 2 * workers:
                running = _collect(running, progress)
            running.add(pool.submit(task))
        while running:
            running = _collect(running, progress)
    finally:
        for future in running:
            future.cancel()
        wait(running)
        os.close(output)


def _collect(running: set[Future[int]], progress: Progress) -> set[Future[int]]:
    done, left = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        progress(future.result())
    return left


def _tasks(
    tensors: tuple[TensorPlan, ...], output: int, start: int, files: OpenFiles
) -> Iterator[_Task]:
    buffers = Buffers()
    for tensor in _joined(tensors):
        if isinstance(tensor, tuple):
            first, nbytes = tensor
            stored = first.source.stored
            assert stored is not None
            source = files.descriptor(stored.file)
            for offset in range(0, nbytes, _COPY_BYTES):
                size = min(_COPY_BYTES, nbytes - offset)
                yield _copy_task(source, stored.start + offset, output, start + offset, size)
            start += nbytes
        else:
            yield from _block_tasks(tensor, output, start, files, buffers)
            start += tensor.nbytes


def _joined(tensors: tuple[TensorPlan, ...]) -> Iterator[tuple[TensorPlan, int] | TensorPlan]:
    """Yield changed tensors, and runs of copied ones that lie side by side as one."""
    run: tuple[TensorPlan, int] | None = None
    for tensor in tensors:
        stored = tensor.source.stored
        if not tensor.copied or stored is None:
            if run is not None:
                yield run
                run = None
            yield tensor
            continue
        if run is not None:
            first = run[0].source.stored
            assert first is not None
            if first.file == stored.file and first.start + run[1] == stored.start:
                run = (run[0], run[1] + stored.nbytes)
                continue
            yield run
        run = (tensor, stored.nbytes)
    if run is not None:
        yield run


def _copy_task(source: int, start: int, output: int, at: int, size: int) -> _Task:
    def task() -> int:
        copy_bytes(source, start, output, at, size)
        return size

    return task


def copy_bytes(source: int, start: int, output: int, at: int, size: int) -> None:
    """Copy bytes between files, inside the system where it can.

    Raises:
        OSError: If the source is shorter, or the output cannot be written.
    """
    done = 0
    in_system = hasattr(os, "copy_file_range")
    while done < size:
        if in_system:
            try:
                copied = os.copy_file_range(source, output, size - done, start + done, at + done)
            except OSError as error:
                if error.errno not in _NO_COPY_FILE_RANGE:
                    raise
                in_system = False
                continue
        else:
            chunk = os.pread(source, min(size - done, 8 << 20), start + done)
            _write_all(output, chunk, at + done)
            copied = len(chunk)
        if copied == 0:
            raise OSError(f"the base became shorter while it was read, at byte {start + done}")
        done += copied


def _no_copy_file_range() -> frozenset[int]:
    import errno

    return frozenset((errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM))


_NO_COPY_FILE_RANGE = _no_copy_file_range()


def _write_all(output: int, data: bytes | memoryview, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(output, view, at)
        view, at = view[written:], at + written


def _block_tasks(
    tensor: TensorPlan, output: int, start: int, files: OpenFiles, buffers: Buffers
) -> Iterator[_Task]:
    changes = [prepare(change) for change in tensor.changes]
    changes = [_with_norm(tensor, change, files, buffers) for change in changes]
    row_bytes = tensor.nbytes // tensor.rows if tensor.rows else 0
    for first, count in _blocks(tensor):
        at = start + first * row_bytes
        yield _block_task(tensor, first, count, changes, files, buffers, output, at)


def _blocks(tensor: TensorPlan) -> Iterator[tuple[int, int]]:
    step = max(1, _BLOCK_ELEMENTS // max(1, tensor.columns))
    for first in range(0, tensor.rows, step):
        yield first, min(step, tensor.rows - first)


def _read_rows(
    tensor: TensorPlan, first: int, count: int, files: OpenFiles, buffers: Buffers
) -> torch.Tensor:
    """Return rows as float64 ``[count, columns]`` in the thread's buffer."""
    import torch

    columns = tensor.columns
    flat = tensor.source.read(files, first * columns, count * columns)
    return buffers.of(torch.float64, flat.numel()).copy_(flat).view(count, columns)


def _block_task(
    tensor: TensorPlan,
    first: int,
    count: int,
    changes: list[PreparedChange],
    files: OpenFiles,
    buffers: Buffers,
    output: int,
    at: int,
) -> _Task:
    def task() -> int:
        import torch

        dtype = torch_dtype(tensor.dtype)
        exact = _read_rows(tensor, first, count, files, buffers)
        merge_rows_(exact, first, tensor.rows, changes)
        single = buffers.of(torch.float32, exact.numel()).view(exact.shape)
        rounded = buffers.of(dtype, exact.numel()).view(exact.shape)
        round_into(exact, single, rounded)
        if tensor.name.endswith(_VARIANCE) and (rounded < 0).any():
            raise LoraportError(
                f"{tensor.name}: expected a variance of zero or more after the merge, got "
                f"{float(rounded.min()):.3g}; use smaller strengths"
            )
        # The sum is the quick look: it is finite unless an element, or the sum itself, is not.
        wide = torch.promote_types(dtype, torch.float32)
        if not rounded.sum(dtype=wide).isfinite() and not rounded.isfinite().all():
            rounded = rounded.clone()  # the base is read anew, which takes the buffers
            if _read_rows(tensor, first, count, files, buffers).isfinite().all():
                raise LoraportError(
                    f"{tensor.name}: expected finite values after the merge, got some beyond what "
                    f"{tensor.dtype} holds; use a smaller strength, or a base in bfloat16 or "
                    "float32"
                )
        raw = memoryview(rounded.view(torch.uint8).flatten().numpy().data)
        _write_all(output, raw, at)
        return len(raw)

    return task


def _with_norm(
    tensor: TensorPlan, prepared: PreparedChange, files: OpenFiles, buffers: Buffers
) -> PreparedChange:
    """Give DoRA on a weight stored ``[in, out]`` its norms, which need all rows."""
    if prepared.change.magnitude is None or not prepared.change.transposed:
        return prepared
    import torch

    squares = torch.zeros(tensor.columns, dtype=torch.float64)
    for first, count in _blocks(tensor):
        weight = _read_rows(tensor, first, count, files, buffers)
        rows = ungained_rows(weight, slice(first, first + count), prepared)
        squares += rows.square().sum(0)
    return replace(prepared, norm=squares.sqrt())
