"""PEFT's patterns of ``rank_pattern`` and ``alpha_pattern``, each looked at once.

Tools write one for every module, tens of thousands for a model's experts: the plain ones are
found by what they say, and only real expressions are tried one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cached_property

from loraport.errors import LoraportError

# Letters, escaped marks, dots (any character) and an anchor: an expression of one length.
_PLAIN = re.compile(r"(\^?)((?:\w|\.|\\[^\w\s])*)")
_PIECE = re.compile(r"\\(.)|(.)")


class Patterns:
    r"""Finds the first of many patterns that matches a module path.

    One matches as the regular expression ``(.*\.)?(PATTERN)$`` does.

    Args:
        patterns: The patterns in order.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self._patterns = tuple(patterns)

    def first(self, module_path: str) -> str | None:
        """Return the first pattern that matches, or ``None``.

        Raises:
            LoraportError: If one before it is no regular expression.
        """
        plain, others = self._sorted
        best = min(_plain_matches(plain, module_path), default=len(self._patterns))
        for number, expression in others.items():
            if number > best:
                break
            if expression is None:
                expression = others[number] = _compiled(self._patterns[number])
            if expression.match(module_path):
                best = number
                break
        return self._patterns[best] if best < len(self._patterns) else None

    @cached_property
    def _sorted(self) -> tuple[_Plain, dict[int, re.Pattern[str] | None]]:
        plain: _Plain = {}
        others: dict[int, re.Pattern[str] | None] = {}
        for number, pattern in enumerate(self._patterns):
            found = _PLAIN.fullmatch(pattern)
            if found is None:
                others[number] = None
                continue
            text, free = "", []
            for escaped, bare in _PIECE.findall(found[2]):
                if bare == ".":
                    free.append(len(text))
                text += escaped or bare
            alike = plain.setdefault(len(text), {})
            alike.setdefault((bool(found[1]), tuple(free)), {}).setdefault(text, number)
        return plain, others


# Length → whether only whole paths match, and where any character does → text → number.
_Plain = dict[int, dict[tuple[bool, tuple[int, ...]], dict[str, int]]]


def _plain_matches(plain: _Plain, module_path: str) -> Iterable[int]:
    starts = [0, *(at + 1 for at, character in enumerate(module_path) if character == ".")]
    for start in starts:
        ending = module_path[start:]
        for (whole, free), numbers in plain.get(len(ending), {}).items():
            text = ending
            for at in free:
                if text[at] != ".":
                    text = f"{text[:at]}.{text[at + 1 :]}"
            if text in numbers and not (whole and start):
                yield numbers[text]


def _compiled(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise LoraportError(
            f"pattern {pattern!r}: expected a regular expression, got {error}"
        ) from error
