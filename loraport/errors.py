"""Errors a user can act on.

Every mistake that comes from outside (a file, an option, a model) is raised as
`LoraportError`; the command line prints its text and exits with 2. Anything
else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import dropwhile

_TRACEBACK = "Traceback (most recent call last)"
_LAST_LINES = 8


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
        text = f"{self.subject}: expected {self.expected}, got {self.got}"
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
            LoraportError: If anything was recorded; one line per problem.
        """
        if not self.found:
            return
        lines = [headline, *(f"  - {problem}" for problem in self.found)]
        raise LoraportError("\n".join(lines))


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
