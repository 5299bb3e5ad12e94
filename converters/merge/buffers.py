"""Memory that is used again and again: asking the system for it costs more than filling it."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


class Buffers(threading.local):
    """One buffer for each dtype and thread."""

    def __init__(self) -> None:
        self._kept: dict[torch.dtype, torch.Tensor] = {}

    def of(self, dtype: torch.dtype, count: int) -> torch.Tensor:
        """Return ``count`` elements of whatever the buffer last held; it grows where it must."""
        import torch

        kept = self._kept.get(dtype)
        if kept is None or kept.numel() < count:
            kept = self._kept[dtype] = torch.empty(count, dtype=dtype)
        return kept[:count]
