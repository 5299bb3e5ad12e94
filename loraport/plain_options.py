"""Options as JSON has them: what is written beside a run, and compared when it is resumed."""

from __future__ import annotations

import numbers
from collections.abc import Collection, Mapping, Set
from dataclasses import fields
from typing import Any


def store_plain(options: Any) -> None:
    """Store what a frozen dataclass was given as Python's own values, in place.

    Numbers, truth values and arrays of NumPy (or torch) become Python's, and what else holds
    values, such as a ``range`` or a set, becomes a tuple: of a set in an order that is always the
    same. Values of wrong types stay, for the checks to name.

    Args:
        options: At the beginning of its ``__post_init__``.
    """
    for each in fields(options):
        object.__setattr__(options, each.name, _plain(getattr(options, each.name)))


def _plain(value: Any) -> Any:
    if isinstance(value, type | str | bytes | int):
        return value
    if hasattr(value, "tolist"):
        return value.tolist()
    if isinstance(value, numbers.Real):
        return float(value)
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_plain(each) for each in value]
    if isinstance(value, Set):
        value = sorted(value, key=str)
    return tuple(_plain(each) for each in value) if isinstance(value, Collection) else value
