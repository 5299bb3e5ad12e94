"""Numbers of bytes as people read them."""

from __future__ import annotations

from loraport.counts import counted


def size_text(count: int) -> str:
    """Return a number of bytes in the unit that suits it.

    >>> size_text(420_096)
    '420.1 kB'
    """
    factor, unit = _unit(count)
    return counted(count, "byte") if factor == 1 else f"{count / factor:.1f} {unit}"


def share_text(done: int, total: int) -> str:
    """Return how much is done of how much, both in the unit that suits the whole.

    >>> share_text(84_000, 420_096)
    '84.0 of 420.1 kB'
    """
    factor, _ = _unit(total)
    return f"{done if factor == 1 else f'{done / factor:.1f}'} of {size_text(total)}"


def _unit(count: int) -> tuple[float, str]:
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return factor, unit
    return 1, "bytes"
