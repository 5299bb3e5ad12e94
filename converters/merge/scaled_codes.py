"""Weights of 8-bit codes, floats or integers, each times the scale of its block."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.merge.sources import OpenFiles
from loraport.base.checkpoint import Checkpoint, TensorInfo
from loraport.errors import LoraportError

if TYPE_CHECKING:
    import torch

FLOAT8 = ("F8_E4M3", "F8_E5M2")
# Scales that are powers of two are exponents in a byte, under either name.
_SCALES = ("F32", "F16", "BF16", "F8_E8M0", "U8")


@dataclass(frozen=True, eq=False)
class ScaledSource:
    """A weight ``[..., rows, columns]`` of codes, seen as the float weight it stands for.

    ``W[i, j] = code[i, j] * scale[i // m, j // n] / divisor``, where the last block of a row or
    column may be cut short.

    Attributes:
        codes: The codes, in the weight's shape.
        scales: One scale a block ``[..., ceil(rows / m), ceil(columns / n)]``.
        rows: Rows of the matrices that have scales of their own.
        block: ``m`` and ``n``, at most as large as a matrix.
        dtype: See `Source`.
        divisor: Of all scales.
    """

    codes: TensorInfo
    scales: TensorInfo
    rows: int
    block: tuple[int, int]
    dtype: str
    divisor: float = 1.0

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Source`."""
        return self.codes.shape

    @property
    def stored(self) -> TensorInfo | None:
        """See `Source`: its bytes are not those to be written."""
        return None

    def read(self, files: OpenFiles, start: int, count: int) -> torch.Tensor:
        """Return elements as float32; see `Source`."""
        import torch

        columns = self.shape[-1]
        first, last = start // columns, -(-(start + count) // columns)
        numbers = torch.arange(first, last)
        down, across = (
            -(-size // step) for size, step in zip(self._matrix, self.block, strict=True)
        )
        lines = numbers // self.rows * down + numbers % self.rows // self.block[0]
        begin, end = int(lines[0]), int(lines[-1]) + 1
        scales = self._read_scales(files, begin * across, (end - begin) * across)
        scales = scales.view(-1, across)[lines - begin]
        wide = scales.repeat_interleave(self.block[1], dim=1)[:, :columns].flatten()
        wide = wide[start - first * columns :][:count]
        raw = files.read(self.codes.file, self.codes.start + start, count)
        return raw.view(_code_dtype(self.codes.dtype)).float() * wide

    @property
    def _matrix(self) -> tuple[int, int]:
        return self.rows, self.shape[-1]

    def _read_scales(self, files: OpenFiles, start: int, count: int) -> torch.Tensor:
        import torch

        size = self.scales.nbytes // math.prod(self.scales.shape)
        raw = files.read(self.scales.file, self.scales.start + start * size, count * size)
        stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        dtype = stored.get(self.scales.dtype, torch.float8_e8m0fnu)
        # A copy, since the codes are read into the same memory.
        return raw.view(dtype).to(torch.float32, copy=True) / self.divisor


def scaled_source(
    checkpoint: Checkpoint,
    weight: str,
    scale: str,
    blocks: Iterable[tuple[int, int]],
    *,
    codes: tuple[str, ...],
    dtype: str,
    divisor: float = 1.0,
) -> ScaledSource:
    """Return a weight of codes, once its scales are known to be one for each block.

    Args:
        checkpoint: Holds both.
        weight: Name of the codes.
        scale: Name of the scales; a single one is that of all codes.
        blocks: Rows and columns of a block, those that its scales may be for.
        codes: Dtypes that codes may have.
        dtype: See `Source`.
        divisor: See `ScaledSource`.

    Raises:
        LoraportError: If either is missing, or they do not fit.
    """
    found, scales = checkpoint.info(weight), checkpoint.info(scale)
    shape = found.shape
    if found.dtype not in codes or len(shape) < 2 or not math.prod(shape):
        raise LoraportError(
            f"expected a matrix of {' or '.join(codes)}, got {found.dtype} {list(shape)}"
        )
    if scales.dtype not in _SCALES:
        raise LoraportError(f"expected scales of {', '.join(_SCALES)}, got {scales.dtype}")
    rows, columns = shape[-2:]
    if math.prod(scales.shape) == 1:
        every = math.prod(shape[:-1])
        return ScaledSource(found, scales, every, (every, columns), dtype, divisor)
    expected = []
    for block in blocks:
        m, n = min(block[0], rows), min(block[1], columns)
        grid = (*shape[:-2], -(-rows // m), -(-columns // n))
        # One scale a row may lack the dimension of columns.
        if scales.shape == grid or (n == columns and scales.shape == grid[:-1]):
            return ScaledSource(found, scales, rows, (m, n), dtype, divisor)
        expected.append(f"{list(grid)} for blocks of {m} x {n}")
    raise LoraportError(
        f"expected {scale} to have one scale for all of {list(shape)}"
        + "".join(f", or {each}" for each in expected)
        + f", got {list(scales.shape)}"
    )


def _code_dtype(name: str) -> torch.dtype:
    import torch

    return {
        "F8_E4M3": torch.float8_e4m3fn,
        "F8_E5M2": torch.float8_e5m2,
        "I8": torch.int8,
    }[name]
