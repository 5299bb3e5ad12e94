"""A checkpoint's parameters, whichever tensors they are stored in."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from converters.merge.base import BaseCheckpoint
from converters.merge.codes import named_as_codes
from converters.merge.layout import BaseLayout, Piece, base_layout
from converters.merge.sources import FLOATING, OpenFiles, Source

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class StoredParameter:
    """A parameter of the model.

    Attributes:
        parts: The tensors it is made of, in order.
        shape: Its shape in the model.
        experts: How many experts it holds; 0 where it is no parameter of experts.
    """

    parts: tuple[tuple[Piece, Source], ...]
    shape: tuple[int, ...]
    experts: int = 0

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(math.prod(part.shape) * FLOATING[part.dtype] for _, part in self.parts)

    def read(self, files: OpenFiles) -> torch.Tensor:
        """Return the whole parameter; not for experts, which are large."""
        import torch

        tensors = [_read(source, files, 0, source.shape) for _, source in self.parts]
        return tensors[0] if len(tensors) == 1 else torch.cat(tensors)

    def read_expert(self, expert: int, files: OpenFiles) -> torch.Tensor:
        """Return one expert's matrix, as the model holds it."""
        import torch

        if self.parts[0][0].whole:
            shape = self.shape[1:]
            return _read(self.parts[0][1], files, expert * math.prod(shape), shape)
        own = [source for piece, source in self.parts if piece.expert == expert]
        return torch.cat([_read(source, files, 0, source.shape) for source in own])


def checkpoint_layout(checkpoint: BaseCheckpoint) -> BaseLayout:
    """Return how a checkpoint stores its model."""
    shapes = {name: source.shape for name, source in checkpoint.sources().items()}
    return base_layout(checkpoint.directory if checkpoint.config else None, shapes)


def stored_parameters(checkpoint: BaseCheckpoint, layout: BaseLayout) -> dict[str, StoredParameter]:
    """Return every parameter that is stored in floating point, by name."""
    sources = checkpoint.sources()
    found = {}
    for parameter, pieces in layout.pieces.items():
        parts = tuple((piece, sources[piece.tensor]) for piece in pieces)
        if all(source.dtype in FLOATING for _, source in parts):
            found[parameter] = _parameter(parameter, parts, layout)
    return found


def rounded_weights(checkpoint: BaseCheckpoint, layout: BaseLayout) -> dict[str, str]:
    """Return the type of every weight that is stored as codes, of which no config.json tells."""
    sources = checkpoint.sources()
    found = {}
    for name, pieces in layout.pieces.items():
        weight = name.rpartition(".")[2] == "weight" or named_as_codes(name)
        for dtype in {sources[piece.tensor].dtype for piece in pieces} - FLOATING.keys():
            if weight or dtype.startswith("F8"):
                found[name] = dtype
    return found


def _parameter(
    name: str, parts: tuple[tuple[Piece, Source], ...], layout: BaseLayout
) -> StoredParameter:
    first, source = parts[0]
    if first.whole:
        fused = len(source.shape) == 3 and not name.endswith(".weight") and layout.known
        return StoredParameter(parts, source.shape, source.shape[0] if fused else 0)
    rows = sum(piece.rows or 0 for piece, _ in parts)
    experts = len({piece.expert for piece, _ in parts}) if first.expert is not None else 0
    if not experts:
        return StoredParameter(parts, (rows, *source.shape[1:]))
    return StoredParameter(parts, (experts, rows // experts, *source.shape[1:]), experts)


def _read(source: Source, files: OpenFiles, start: int, shape: tuple[int, ...]) -> torch.Tensor:
    # The next read overwrites what this one returns, and two weights are compared.
    return source.read(files, start, math.prod(shape)).clone().reshape(shape)
