"""Check the values of options: each check records what is wrong, and one error tells all."""

from __future__ import annotations

import math
import numbers
import os
from collections.abc import Collection, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, TypeVar

from loraport.errors import LoraportError, Problems

_T = TypeVar("_T")


def is_whole(value: object) -> bool:
    """Tell whether a value is a whole number."""
    return isinstance(value, numbers.Integral)


def is_finite(value: object) -> bool:
    """Tell whether a value is a finite number, and one that a float can hold."""
    try:
        return isinstance(value, numbers.Real) and math.isfinite(value)
    except OverflowError:
        return False


def shown(value: object) -> str:
    """Return a number as it is, and anything else such that a text of one is told from it."""
    return str(value) if isinstance(value, numbers.Real) else repr(value)


def check_count(problems: Problems, name: str, value: Any, least: int) -> None:
    """Check that a value is a whole number of at least so much."""
    if is_whole(value):
        check_at_least(problems, name, value, least)
    else:
        problems.add(name, f"a whole number, at least {least}", repr(value))


def check_at_least(problems: Problems, name: str, value: Any, least: float) -> None:
    """Check that a value is a finite number of at least so much."""
    if not (is_finite(value) and value >= least):
        problems.add(name, f"at least {least}", shown(value))


def check_share(problems: Problems, name: str, value: Any) -> None:
    """Check that a value is a share of a whole, but not all of it."""
    if not (is_finite(value) and 0 <= value < 1):
        problems.add(name, "a share from 0 to below 1", shown(value))


def check_switches(problems: Problems, options: object, *names: str) -> None:
    """Check that options are switches: a text like "no" would be taken for yes."""
    for name in names:
        value = getattr(options, name)
        if getattr(value, "shape", ()) != () or value not in (True, False):  # arrays say neither
            problems.add(name, "True or False", repr(value))


def check_parts(problems: Problems, options: object, **kinds: type) -> None:
    """Check that options which are options themselves are of their class."""
    for name, kind in kinds.items():
        if not isinstance(value := getattr(options, name), kind):
            problems.add(name, kind.__name__, _kind(value))


def check_text(problems: Problems, name: str, value: object, expected: str) -> None:
    """Check that a value is a text."""
    if not isinstance(value, str):
        problems.add(name, expected, repr(value))


def check_names(problems: Problems, name: str, value: object) -> bool:
    """Check that a value is a list of names, and tell whether it is; a single text is none."""
    if not isinstance(value, Collection) or isinstance(value, (str, bytes, Mapping)):
        named = False
    else:
        named = all(isinstance(each, str) for each in value)
    if not named:
        problems.add(name, 'a list of names, such as ("one", "other")', repr(value))
    return named


def is_path(value: object) -> bool:
    """Tell whether a value is a path, or the text of one."""
    return isinstance(value, (str, os.PathLike))


def check_path(problems: Problems, name: str, value: object) -> None:
    """Check that a value is a path, or the text of one."""
    if not is_path(value):
        problems.add(name, "a path", repr(value))


def as_path(name: str, value: Path | str) -> Path:
    """Return a path that a call was given.

    Raises:
        LoraportError: If it is none, nor the text of one.
    """
    if not is_path(value):
        raise LoraportError(f"{name}: expected a path, got {value!r}")
    return Path(value)


def given_or_default(options: _T | None, kind: type[_T], name: str = "options") -> _T:
    """Return the options that a call was given, or the defaults where it was given none.

    Raises:
        LoraportError: If what it was given is of another class.
    """
    if options is None:
        return kind()
    if not isinstance(options, kind):
        raise LoraportError(f"{name}: expected {kind.__name__}, got {_kind(options)}")
    return options


def _kind(value: object) -> str:
    """Return what a value is; of options and the like the class alone, which have many fields."""
    return type(value).__name__ if is_dataclass(value) else repr(value)
