"""The base checkpoint as a merge sees it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from converters.merge.sources import FLOATING, Source


@dataclass(frozen=True, eq=False)
class BaseCheckpoint:
    """A base's tensors, shard by shard.

    Attributes:
        directory: Where its other files lie.
        shards: Shard file, as seen from there → its tensors in the order of their bytes;
            dequantized ones stand in the place of their quantized parts.
        metadata: What the shards' headers say beside their tensors.
        config: Its ``config.json``, empty if it has none.
        quantized: How it was quantized, or ``None``.
    """

    directory: Path
    shards: Mapping[Path, Mapping[str, Source]]
    metadata: Mapping[str, str]
    config: Mapping[str, Any]
    quantized: str | None = None

    def sources(self) -> dict[str, Source]:
        """Return every tensor by name."""
        return {name: source for shard in self.shards.values() for name, source in shard.items()}

    def common_dtype(self) -> str:
        """Return the floating dtype that most of the checkpoint is in."""
        weights: Counter[str] = Counter()
        for source in self.sources().values():
            if source.dtype in FLOATING:
                size = 1
                for length in source.shape:
                    size *= length
                weights[source.dtype] += size
        return weights.most_common(1)[0][0] if weights else "F32"
