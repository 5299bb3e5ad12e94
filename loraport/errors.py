"""Errors a user can act on.

Every mistake that comes from outside (a file, an option, a model) is raised as
`LoraportError`; the command line prints its text and exits with 2. Anything
else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from itertools import dropwhile
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

_TRACEBACK = "Traceback (most recent call last)"
_LAST_LINES = 8
_ALIKE_SHOWN = 50  # problems that differ in nothing but their subject
_NAMES_SHOWN = 12


class LoraportError(Exception):
    """Bad input: the message names the thing, what was expected, what was got and what to do."""


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        subject: The tensor, key, file or module concerned.
        expected: What would have been right.
        got: What was found.
        remedy: What the user can do about it.
    """

    subject: str
    expected: str
    got: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.subject}: {self.told}"

    @property
    def told(self) -> str:
        """What is told of it beside its subject."""
        text = f"expected {self.expected}, got {self.got}"
        return f"{text}; {self.remedy}" if self.remedy else text


@dataclass
class Problems:
    """Collects every problem of one input, so that they are reported together."""

    found: list[Problem] = field(default_factory=list)

    def add(self, subject: str, expected: str, got: str, remedy: str = "") -> None:
        """Record one problem and carry on."""
        self.found.append(Problem(subject, expected, got, remedy))

    def raise_if_any(self, headline: str) -> None:
        """Raise all recorded problems as one error.

        Args:
            headline: What was being read, e.g. ``"adapter 'x' cannot be read"``.

        Raises:
            LoraportError: If anything was recorded; one line per problem, and one for those
                beyond the first 50 that differ in nothing but their subject.
        """
        if not self.found:
            return
        lines = [headline]
        alike: Counter[str] = Counter()
        for problem in self.found:
            told = problem.told
            alike[told] += 1
            if alike[told] <= _ALIKE_SHOWN:
                lines.append(f"  - {problem}")
        lines += [
            f"  - and {count - _ALIKE_SHOWN} more: {told}"
            for told, count in alike.items()
            if count > _ALIKE_SHOWN
        ]
        raise LoraportError("\n".join(lines))


def first_names(names: Iterable[str], most: int = _NAMES_SHOWN) -> str:
    """Return names as a list, of more than ``most`` the first and how many more there are.

    >>> first_names(["a", "b"]), first_names([])
    ('a, b', 'none')
    >>> first_names(str(number) for number in range(15))
    '0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 3 more'
    >>> first_names("abc", 1)
    'a and 2 more'
    """
    known = list(names)
    more = f" and {len(known) - most} more" if len(known) > most else ""
    return (", ".join(known[:most]) or "none") + more


def first_line(error: BaseException) -> str:
    r"""Return the first line of an error of another library's, or its kind where it says nothing.

    >>> first_line(ValueError("no such axis\n  at ...")), first_line(KeyError())
    ('no such axis', 'KeyError')
    """
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def last_words(said: str) -> list[str]:
    r"""Return what a program that failed said last, lines of text without empty ones.

    Of a Python program that is the error that ended it, not where in its code that was.

    >>> last_words("loading\nTraceback (most recent call last):\n  File ...\nKeyError: 'a'\n")
    ["KeyError: 'a'"]
    """
    lines = [line for line in said.splitlines() if line.strip()]
    traced = [at for at, line in enumerate(lines) if line.startswith(_TRACEBACK)]
    error = list(
        dropwhile(lambda line: line[0].isspace(), lines[traced[-1] + 1 :] if traced else [])
    )
    return error[:_LAST_LINES] or lines[-_LAST_LINES:]
