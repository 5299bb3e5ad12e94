"""Text that others wrote, for a terminal."""

from __future__ import annotations

import re

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    r"""Return text whose control characters are escapes, but for line feeds and tabs.

    A terminal would follow them: move its cursor, clear what stands there, take another title.

    >>> visible("a\x1b[2J\r\n\tb")
    'a\\x1b[2J\\r\n\tb'
    """
    return _CONTROL.sub(lambda found: repr(found[0])[1:-1], text)
