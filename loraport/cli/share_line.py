"""How far something is, on stderr: a line that is redrawn on a terminal, else one per tenth."""

from __future__ import annotations

import sys
from types import TracebackType


class ShareLine:
    """Show it whenever there is news; use it as a context, which ends the line."""

    def __init__(self) -> None:
        self._shown = -1.0
        self._stream = sys.stderr or None  # nothing where it is closed
        self._live = self._stream is not None and self._stream.isatty()

    def __enter__(self) -> ShareLine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._live:
            print(file=self._stream)

    def is_due(self, share: float) -> bool:
        """Tell whether what is done since the last text is worth another."""
        return share >= 1 or share - self._shown >= (0.002 if self._live else 0.1)

    def show(self, share: float, text: str) -> None:
        """Show a text.

        Args:
            share: Of what is to be done.
            text: One line.
        """
        self._shown = share
        if self._stream is not None:
            line, end = (f"\r{text}  ", "") if self._live else (text, "\n")
            print(line, end=end, file=self._stream, flush=True)
