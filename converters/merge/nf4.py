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
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from converters.merge.quantized import DTYPES, Dequantized, QuantizedCheckpoint
from converters.merge.sources import OpenFiles, StoredSource
from loraport.checkpoint import Checkpoint, TensorInfo
from loraport.errors import LoraportError

if TYPE_CHECKING:
    import torch

_STATES = (".quant_state.bitsandbytes__nf4", ".quant_state.bitsandbytes__fp4")


@dataclass(frozen=True, eq=False)
class Nf4Source:
    """A 4-bit weight, seen as the float weight it stands for.

    Attributes:
        info: The packed codes.
        shape: Shape of the weight.
        dtype: What the weight was in before it was quantized.
        block: Elements that share a scale.
        scales: ``[blocks]`` float32.
        values: ``[16]`` float32.
    """

    info: TensorInfo
    shape: tuple[int, ...]
    dtype: str
    block: int
    scales: torch.Tensor
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
        return self.values[codes.int()] * self.scales[blocks]


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
    count, block = math.prod(shape), int(state["blocksize"])
    info = StoredSource(checkpoint.info(weight)).info
    if info.nbytes != -(-count // 2):
        raise ValueError(f"{info.nbytes} bytes of codes for {count} elements")
    absmax = checkpoint.load(f"{weight}.absmax")
    if f"{weight}.nested_absmax" in checkpoint:
        nested = checkpoint.load(f"{weight}.nested_absmax")
        table = checkpoint.load(f"{weight}.nested_quant_map").float()
        size = int(state["nested_blocksize"])
        wide = nested.float().repeat_interleave(size)[: absmax.numel()]
        absmax = table[absmax.flatten().int()] * wide + float(state["nested_offset"])
    if absmax.numel() != -(-count // block):
        raise ValueError(f"{absmax.numel()} scales for {count} elements in blocks of {block}")
    values = checkpoint.load(f"{weight}.quant_map").float().flatten()
    if values.numel() != 16:
        raise ValueError(f"{values.numel()} values for 4-bit codes")
    return Nf4Source(info, shape, DTYPES[state["dtype"]], block, absmax.float().flatten(), values)
