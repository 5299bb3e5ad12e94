"""What a merge will do to each tensor, decided before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from converters.merge.arithmetic import Change
from converters.merge.base import BaseCheckpoint
from converters.merge.sources import GivenSource, Source, torch_dtype


@dataclass(frozen=True, eq=False)
class TensorPlan:
    """One tensor of the output.

    Attributes:
        name: Its name.
        source: Where its values come from.
        dtype: The safetensors name of its dtype.
        columns: Columns of the matrix that the changes see.
        changes: What is added; without any it is copied.
        note: What is special about it, for the user.
    """

    name: str
    source: Source
    dtype: str
    columns: int = 1
    changes: tuple[Change, ...] = ()
    note: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return self.source.shape

    @property
    def rows(self) -> int:
        """Rows of the matrix that the changes see."""
        return math.prod(self.shape) // self.columns if self.columns else 0

    @property
    def copied(self) -> bool:
        """Whether its bytes are some of the base's."""
        return not self.changes and self.source.stored is not None

    @property
    def changed(self) -> bool:
        """Whether an adapter has a part in its values; not so if it is only dequantized."""
        return bool(self.changes) or isinstance(self.source, GivenSource)

    @property
    def nbytes(self) -> int:
        """Its bytes in the output."""
        if not self.changes and self.source.stored is not None:
            return self.source.stored.nbytes
        return math.prod(self.shape) * torch_dtype(self.dtype).itemsize


@dataclass(frozen=True, eq=False)
class MergePlan:
    """A whole merge.

    Attributes:
        base: The base.
        shards: Output file name → its tensors in order.
        config: The output's ``config.json``, or ``None`` where the base's is right.
        notes: What the user should know.
    """

    base: BaseCheckpoint
    shards: Mapping[str, tuple[TensorPlan, ...]]
    config: Mapping[str, Any] | None = None
    notes: tuple[str, ...] = ()

    @property
    def tensors(self) -> list[TensorPlan]:
        """All tensors."""
        return [tensor for shard in self.shards.values() for tensor in shard]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors)
