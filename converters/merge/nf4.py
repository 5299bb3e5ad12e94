"""bitsandbytes 4-bit checkpoints, dequantized without bitsandbytes.

The format is QLoRA's (Dettmers et al. 2023, arXiv:2305.14314).

A weight ``W`` is stored as ``W`` (two 4-bit codes a byte, the first in the high half),
``W.absmax`` (one scale a block), ``W.quant_map`` (the 16 values) and
``W.quant_state.bitsandbytes__nf4`` (JSON: shape, dtype, block sizes). With double quantization
the scales are 8-bit codes themselves: ``W.nested_quant_map[code] * W.nested_absmax[block]`` plus
an offset.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converters.merge.quantized import DTYPES, Dequantized, QuantizedCheckpoint
from converters.merge.sources import OpenFiles, StoredSource
from loraport.base.checkpoint import Checkpoint, TensorInfo
from loraport.errors import LoraportError

if TYPE_CHECKING:
    import torch

_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")


@dataclass(frozen=True, eq=False)
class _Scales:
    """One scale a block, as stored: double quantization's are computed where they are read.

    Attributes:
        stored: ``[blocks]`` floats, or uint8 codes where there is a ``table``.
        table: ``[256]`` float32, the codes' values; ``None`` for scales that are floats.
        nested: ``[ceil(blocks / size)]`` float32, scales of the codes.
        size: Codes that share one of them.
        offset: What is added.
    """

    stored: torch.Tensor
    table: torch.Tensor | None = None
    nested: torch.Tensor | None = None
    size: int = 1
    offset: float = 0.0

    def read(self, first: int, last: int) -> torch.Tensor:
        """Return the scales of some blocks, float32."""
        import torch

        part = self.stored[first:last]
        if self.table is None or self.nested is None:
            return part.float()
        wide = self.nested[torch.arange(first, last) // self.size]
        return self.table[part.int()] * wide + self.offset


@dataclass(frozen=True, eq=False)
class Nf4Source:
    """A 4-bit weight, seen as the float weight it stands for.

    Attributes:
        info: The packed codes.
        shape: Shape of the weight.
        dtype: What the weight was in before it was quantized.
        block: Elements that share a scale.
        scales: One a block.
        values: ``[16]`` float32.
    """

    info: TensorInfo
    shape: tuple[int, ...]
    dtype: str
    block: int
    scales: _Scales
    values: torch.Tensor

    @property
    def stored(self) -> TensorInfo | None:
        """See `Source`: its bytes are not those to be written."""
        return None

    def read(self, files: OpenFiles, start: int, count: int) -> torch.Tensor:
        """Return elements as float32, each a value times its block's scale."""
        import torch

        first, last = start // 2, -(-(start + count) // 2)
        packed = files.read(self.info.file, self.info.start + first, last - first)
        codes = torch.stack((packed >> 4, packed & 15), dim=1).flatten()
        codes = codes[start - 2 * first : start - 2 * first + count]
        blocks = torch.arange(start, start + count) // self.block
        first = start // self.block
        scales = self.scales.read(first, -(-(start + count) // self.block))
        return self.values[codes.int()] * scales[blocks - first]


def add_nf4_weights(quantized: QuantizedCheckpoint, result: Dequantized) -> None:
    """Add a checkpoint's 4-bit weights."""
    checkpoint = quantized.checkpoint
    states = {
        name.removesuffix(suffix): name
        for name in checkpoint
        for suffix in _STATES
        if name.endswith(suffix)
    }
    result.parts.update(
        name for name in checkpoint if any(owner in states for owner in _owners(name))
    )
    for weight, name in states.items():
        try:
            result.weights[weight] = weight, _source(checkpoint, weight, name)
        except (LoraportError, KeyError, ValueError, TypeError, IndexError) as error:
            result.problems.add(weight, "a whole 4-bit weight of bitsandbytes", repr(error))


def _owners(name: str) -> Iterator[str]:
    """Yield the names that a tensor's can be a part of: it without its last words."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _source(checkpoint: Checkpoint, weight: str, state_name: str) -> Nf4Source:
    state: dict[str, Any] = json.loads(bytes(checkpoint.load(state_name).tolist()))
    shape = tuple(int(length) for length in state["shape"])
    count, block = math.prod(shape), _size(state, "blocksize")
    info = StoredSource(checkpoint.info(weight)).info
    if info.nbytes != -(-count // 2):
        raise ValueError(f"{info.nbytes} bytes of codes for {count} elements")
    scales = _scales(checkpoint, weight, state, -(-count // block))
    values = _numbers(checkpoint, f"{weight}.quant_map", 16).float()
    return Nf4Source(info, shape, DTYPES[state["dtype"]], block, scales, values)


def _scales(checkpoint: Checkpoint, weight: str, state: Mapping[str, Any], blocks: int) -> _Scales:
    absmax = _numbers(checkpoint, f"{weight}.absmax", blocks)
    if f"{weight}.nested_absmax" not in checkpoint:
        return _Scales(absmax)
    if str(absmax.dtype) != "torch.uint8":
        raise ValueError(f"{weight}.absmax holds {absmax.dtype}, not codes of 8 bits")
    size = _size(state, "nested_blocksize")
    table = _numbers(checkpoint, f"{weight}.nested_quant_map", 256).float()
    nested = _numbers(checkpoint, f"{weight}.nested_absmax", -(-blocks // size)).float()
    return _Scales(absmax, table, nested, size, float(state["nested_offset"]))


def _size(state: Mapping[str, Any], key: str) -> int:
    size = int(state[key])
    if size < 1:
        raise ValueError(f"{key} is {size}")
    return size


def _numbers(checkpoint: Checkpoint, name: str, count: int) -> torch.Tensor:
    tensor = checkpoint.load(name).flatten()
    if tensor.numel() != count:
        raise ValueError(f"{name} holds {tensor.numel()} numbers, not {count}")
    return tensor
