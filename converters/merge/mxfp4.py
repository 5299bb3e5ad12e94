"""Experts in MXFP4, as OpenAI publishes gpt-oss.

The format is OCP's Microscaling (MX) v1.0: 32 numbers of 4 bits (e2m1) share a scale that is a
power of two. Experts ``P``, ``[experts, in, out]`` in the model, are stored as ``P_blocks``
``[experts, out, in / 32, 16]``, two numbers a byte, the first in the low half, and ``P_scales``
``[experts, out, in / 32]``, exponents plus 127; both uint8.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from converters.merge.quantized import Dequantized, QuantizedCheckpoint
from converters.merge.sources import OpenFiles
from loraport.base.checkpoint import Checkpoint, TensorInfo

if TYPE_CHECKING:
    import torch

_SHARED = 32  # numbers that share a scale
_BLOCKS, _SCALES = "_blocks", "_scales"
_POSITIVE = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True, eq=False)
class Mxfp4Source:
    """Experts in MXFP4, seen as the float parameter they stand for.

    Attributes:
        checkpoint: Holds their parts.
        name: The parameter's.
        shape: ``[experts, in, out]``.
        dtype: See `Source`.
    """

    checkpoint: Checkpoint
    name: str
    shape: tuple[int, int, int]
    dtype: str

    @property
    def stored(self) -> TensorInfo | None:
        """See `Source`: its bytes are not those to be written."""
        return None

    def read(self, files: OpenFiles, start: int, count: int) -> torch.Tensor:  # noqa: ARG002
        """Return elements as float32; see `Source`."""
        import torch

        _, features, out = self.shape
        row, last = start // out, -(-(start + count) // out)
        found = []
        while row < last:
            expert, first = divmod(row, features)
            rows = min(last - row, features - first)
            found.append(self._rows(expert, first, rows))
            row += rows
        return torch.cat(found).flatten()[start % out :][:count]

    def _rows(self, expert: int, first: int, rows: int) -> torch.Tensor:
        """Return rows of one expert ``[rows, out]``, which are columns of what is stored."""
        import torch

        groups = slice(first // _SHARED, -(-(first + rows) // _SHARED))
        part = (slice(expert, expert + 1), slice(None), groups)
        packed = self.checkpoint.load_part(self.name + _BLOCKS, *part)[0]
        scales = self.checkpoint.load_part(self.name + _SCALES, *part)[0]
        pairs, powers = _tables()
        values = pairs.index_select(0, packed.int().flatten()).view(torch.float32)
        values = values.view(*scales.shape, _SHARED) * powers[scales.int()][..., None]
        begin = first - _SHARED * groups.start
        return values.flatten(1)[:, begin : begin + rows].T


def mxfp4_weights(quantized: QuantizedCheckpoint) -> Dequantized:
    """Return the experts of a checkpoint whose ``quant_method`` is ``mxfp4``."""
    checkpoint, result = quantized.checkpoint, Dequantized()
    for name in checkpoint:
        if name.endswith(_BLOCKS):
            experts = name.removesuffix(_BLOCKS)
            shape, problem = _shape(checkpoint, experts)
            if shape is None:
                result.problems.add(experts, "whole experts in MXFP4", problem)
                continue
            result.parts.add(experts + _SCALES)
            result.weights[name] = experts, Mxfp4Source(checkpoint, experts, shape, quantized.dtype)
        elif name.endswith(_SCALES) and name.removesuffix(_SCALES) + _BLOCKS not in checkpoint:
            result.problems.add(name, "the blocks that it scales", "none")
    return result


def _shape(checkpoint: Checkpoint, name: str) -> tuple[tuple[int, int, int] | None, str]:
    """Return the experts' shape ``[experts, in, out]``, or ``None`` and what is wrong with them."""
    if name in checkpoint:
        return None, "a tensor of this name as well"
    if name + _SCALES not in checkpoint:
        return None, "no scales"
    blocks, scales = checkpoint.info(name + _BLOCKS), checkpoint.info(name + _SCALES)
    fits = len(blocks.shape) == 4 and blocks.shape == (*scales.shape, _SHARED // 2)
    if not fits or not all(blocks.shape) or {blocks.dtype, scales.dtype} != {"U8"}:
        return None, (
            f"blocks {blocks.dtype} {list(blocks.shape)} and scales {scales.dtype} "
            f"{list(scales.shape)}, where U8 [experts, out, n, {_SHARED // 2}] and "
            "U8 [experts, out, n] belong together"
        )
    experts, out, groups = scales.shape
    return (experts, groups * _SHARED, out), ""


@cache
def _tables() -> tuple[torch.Tensor, torch.Tensor]:
    """Return what bytes stand for: two float32 numbers, as one int64; and a power, one being NaN.

    To look up both numbers at once takes a fifth of the time.
    """
    import torch

    numbers = torch.tensor([*_POSITIVE, *(-number for number in _POSITIVE)])
    byte = torch.arange(256)
    pairs = torch.stack((numbers[byte & 15], numbers[byte >> 4]), dim=1).view(torch.int64)
    powers = torch.tensor([*(2.0 ** (code - 127) for code in range(255)), torch.nan])
    return pairs.flatten(), powers
