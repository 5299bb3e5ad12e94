"""Numbers of things as people read them."""

from __future__ import annotations


def counted(count: int, thing: str) -> str:
    """Return how many there are of a thing.

    >>> counted(1, "module"), counted(3, "replaced parameter")
    ('1 module', '3 replaced parameters')
    """
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def counted_were(count: int, thing: str) -> str:
    """Return how many there are of a thing to which something was done.

    >>> counted_were(1, "row"), counted_were(3, "row")
    ('1 row was', '3 rows were')
    """
    return f"{counted(count, thing)} {'was' if count == 1 else 'were'}"
