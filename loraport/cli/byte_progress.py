"""Progress by bytes, on stderr: a line that is redrawn on a terminal, else one line per tenth."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from loraport.cli.sizes import share_text, size_text


class ByteProgress:
    """Call it with the bytes done since the last call.

    Args:
        what: What is being done.
        total: Bytes altogether, or 0 where each call tells.
    """

    def __init__(self, what: str, total: int = 0) -> None:
        self._what = what
        self._total = total
        self._done = 0
        self._shown = -1.0
        self._started = time.monotonic()
        self._live = sys.stderr.isatty()

    def __enter__(self) -> ByteProgress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            print(file=sys.stderr)

    def __call__(self, nbytes: int, total: int | None = None) -> None:
        """Take note of ``nbytes`` more, of ``total``."""
        self._total = total or self._total
        self._done += nbytes
        share = self._done / self._total if self._total else 1.0
        if share < 1 and share - self._shown < (0.002 if self._live else 0.1):
            return
        self._shown = share
        seconds = max(time.monotonic() - self._started, 1e-9)
        text = (
            f"{self._what}: {share_text(self._done, self._total)}, "
            f"{share:.0%}, {size_text(round(self._done / seconds))}/s"
        )
        print(
            f"\r{text}  " if self._live else text, end="" if self._live else "\n", file=sys.stderr
        )
        sys.stderr.flush()
