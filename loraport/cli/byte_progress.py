"""Progress by bytes."""

from __future__ import annotations

import time

from loraport.cli.share_line import ShareLine
from loraport.cli.sizes import share_text, size_text


class ByteProgress(ShareLine):
    """Call it with the bytes done since the last call.

    Args:
        what: What is being done.
        total: Bytes altogether, or 0 where each call tells.
    """

    def __init__(self, what: str, total: int = 0) -> None:
        super().__init__()
        self._what = what
        self._total = total
        self._done = 0
        self._started = time.monotonic()

    def __enter__(self) -> ByteProgress:
        return self

    def __call__(self, nbytes: int, total: int | None = None) -> None:
        """Take note of ``nbytes`` more, of ``total``."""
        self._total = total or self._total
        self._done += nbytes
        share = self._done / self._total if self._total else 1.0
        if not self.is_due(share):
            return
        seconds = max(time.monotonic() - self._started, 1e-9)
        speed = size_text(round(self._done / seconds))
        self.show(
            share, f"{self._what}: {share_text(self._done, self._total)}, {share:.0%}, {speed}/s"
        )
