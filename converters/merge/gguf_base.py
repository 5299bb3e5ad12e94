"""A GGUF file as the base of a merge: dequantized a stretch at a time, as it is written."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.merge.base import BaseCheckpoint
from converters.merge.sources import OpenFiles, Source
from loraport.base.checkpoint import TensorInfo
from loraport.base.config import read_model_config
from loraport.base.finding import gguf_model_files
from loraport.base.gguf.model import GgufModel, GgufWeight

if TYPE_CHECKING:
    import torch

_SHARD_BYTES = 5 * 10**9  # as transformers cuts large models


@dataclass(frozen=True, eq=False)
class GgufSource:
    """A weight of a GGUF file, seen as the float weight it stands for."""

    model: GgufModel
    weight: GgufWeight
    dtype: str = "F32"

    @property
    def shape(self) -> tuple[int, ...]:
        """See `Source`."""
        return self.weight.shape

    @property
    def stored(self) -> TensorInfo | None:
        """See `Source`: its bytes are not those to be written."""
        return None

    def read(self, files: OpenFiles, start: int, count: int) -> torch.Tensor:  # noqa: ARG002
        """See `Source`."""
        import numpy as np
        import torch

        values = np.require(self.model.read(self.weight, start, count), requirements=["C", "W"])
        return torch.from_numpy(values)


def open_gguf(file: Path) -> BaseCheckpoint:
    """Open a GGUF file; its weights stay where they are.

    Raises:
        LoraportError: If it is damaged or transformers does not know its architecture.
    """
    model = GgufModel(file)
    directory = gguf_model_files(model)
    sources = {name: GgufSource(model, weight) for name, weight in model.weights.items()}
    return BaseCheckpoint(
        directory, _cut(sources), {"format": "pt"}, read_model_config(directory), "GGUF"
    )


def _cut(sources: dict[str, GgufSource]) -> dict[Path, dict[str, Source]]:
    shards: list[dict[str, Source]] = [{}]
    filled = 0
    for name, source in sources.items():
        nbytes = 4 * math.prod(source.shape)
        if shards[-1] and filled + nbytes > _SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = source
        filled += nbytes
    if len(shards) == 1:
        return {Path("model.safetensors"): shards[0]}
    return {
        Path(f"model-{number:05d}-of-{len(shards):05d}.safetensors"): shard
        for number, shard in enumerate(shards, 1)
    }
