"""Read training rows from JSONL; everything wrong with a file is told at once."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraport.errors import LoraportError
from loraport.training.data.file_kinds import require_lines

_SHOWN = 20
_LETTERS = 40  # of a value in an error
_FORMATS = '"text", "prompt" with "completion", or "messages"'
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Record:
    """One line of a data file, its form checked.

    Attributes:
        line: Its number, the first being 1.
        text: All of it is learned, in the ``text`` format; else empty.
        prompt: What comes before the completion.
        completion: What is learned, in the ``prompt``/``completion`` format; else ``None``.
        messages: A chat, of which the turns that `is_learned` says are learned; else empty.
        tools: What the assistant can call, for the chat template, as transformers has it.
    """

    line: int
    text: str = ""
    prompt: str = ""
    completion: str | None = None
    messages: tuple[Mapping[str, Any], ...] = ()
    tools: tuple[Mapping[str, Any], ...] = ()


def is_learned(turn: Mapping[str, Any]) -> bool:
    """Tell whether a turn of a chat is learned: the assistant's, but those of ``"weight": 0``.

    That is how OpenAI's format for fine-tuning marks turns that are only read.
    """
    return turn["role"] == "assistant" and turn.get("weight") != 0


class BadLines:
    """Collects what is wrong with a file's lines.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._found: list[tuple[int, str]] = []

    def add(self, line: int, reason: str) -> None:
        """Record one bad line and carry on."""
        self._found.append((line, reason))

    def raise_if_any(self) -> None:
        """Raise all bad lines as one error, the first twenty in full.

        Raises:
            LoraportError: If there are any.
        """
        if not self._found:
            return
        self._found.sort()
        count = len(self._found)
        lines = [f"{self._path}: {count} bad line{'s' if count > 1 else ''}"]
        lines += [f"  {self._path}:{line}: {reason}" for line, reason in self._found[:_SHOWN]]
        if count > _SHOWN:
            lines.append(f"  ... and {count - _SHOWN} more")
        raise LoraportError("\n".join(lines))


def read_records(path: Path, bad: BadLines) -> list[Record]:
    """Read a JSONL file; empty lines are skipped.

    Args:
        path: UTF-8, one JSON object per line.
        bad: Receives the lines that cannot be used.

    Raises:
        LoraportError: If the file cannot be read.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise LoraportError(f"data {path}: cannot be read: {error.strerror}") from error
    content = content.removeprefix(b"\xef\xbb\xbf")
    require_lines(path, content)
    records = []
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            records.append(_record(number, line))
        except _BadLineError as error:
            bad.add(number, str(error))
    return records


class _BadLineError(Exception):
    """Why a line cannot be used."""


def _record(number: int, line: bytes) -> Record:
    try:
        value = json.loads(line.decode("utf-8"), object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise _BadLineError(f"expected UTF-8, got byte {line[error.start]:#04x}") from error
    except (ValueError, RecursionError) as error:
        raise _BadLineError(f"expected JSON, got: {error}") from error
    if not isinstance(value, dict):
        raise _BadLineError(f"expected an object, got {_kind(value)}")
    present = [key for key in ("text", "prompt", "completion", "messages") if key in value]
    for key in present:
        _require_whole_characters(value[key], key)
    if present == ["text"]:
        return Record(number, text=_filled(value, "text"))
    if present == ["prompt", "completion"]:
        prompt = value["prompt"]
        if not isinstance(prompt, str):
            raise _BadLineError(f'"prompt": expected a string, got {_kind(prompt)}')
        return Record(number, prompt=prompt, completion=_filled(value, "completion"))
    if present == ["messages"]:
        tools = _tools(value.get("tools"))
        return Record(number, messages=_messages(value["messages"]), tools=tools)
    got = ", ".join(present) or f"keys {', '.join(sorted(value))[:60] or '(none)'}"
    raise _BadLineError(f"expected {_FORMATS}, got {got}")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, in which no key may be twice: one value would be lost."""
    found = dict(pairs)
    if len(found) < len(pairs):
        key, count = Counter(key for key, _ in pairs).most_common(1)[0]
        raise _BadLineError(
            f"expected each key of an object once, got {json.dumps(key)[:_LETTERS]} {count} times; "
            "keep one of them"
        )
    return found


def _require_whole_characters(value: Any, field: str) -> None:
    r"""Refuse half of a pair of escapes (``\ud800`` alone), which is no text to a tokenizer."""
    waiting = [(field, value)]
    while waiting:
        field, value = waiting.pop()
        if isinstance(value, list):
            waiting += [(f"{field}[{index}]", item) for index, item in enumerate(value)]
        elif isinstance(value, dict):
            waiting += [(f"a key of {field}", key) for key in value]
            waiting += [(f"{field}.{key}", item) for key, item in value.items()]
        elif isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError as error:
                raise _BadLineError(
                    f"{field}: expected whole characters, got half of one, "
                    f"{value[error.start]!a}, without its other half; write both or neither"
                ) from error


def _messages(value: Any) -> tuple[Mapping[str, Any], ...]:
    if not isinstance(value, list) or not value:
        raise _BadLineError(f'"messages": expected a list of turns, got {_kind(value)}')
    for index, turn in enumerate(value):
        if not isinstance(turn, dict):
            raise _BadLineError(f"messages[{index}]: expected an object, got {_kind(turn)}")
        if turn.get("role") not in _ROLES:
            raise _BadLineError(
                f"messages[{index}].role: expected one of {', '.join(_ROLES)}, "
                f"got {turn.get('role')!r}"
            )
        content = turn.get("content")
        if not isinstance(content, str) and not (content is None and turn.get("tool_calls")):
            raise _BadLineError(
                f"messages[{index}].content: expected a string, got {_kind(content)}"
            )
        weight = turn.get("weight")
        if weight is not None and (weight not in (0, 1) or turn["role"] != "assistant"):
            raise _BadLineError(
                f"messages[{index}].weight: expected 0 or 1, of an assistant's turn, got "
                f"{json.dumps(weight)[:_LETTERS]}, of role {turn['role']}"
            )
    if not any(is_learned(turn) for turn in value):
        raise _BadLineError("messages: expected an assistant turn to learn, got none")
    return tuple(value)


def _tools(value: Any) -> tuple[Mapping[str, Any], ...]:
    _require_whole_characters(value, "tools")
    if value is None or value == []:
        return ()
    if not isinstance(value, list):
        raise _BadLineError(f'"tools": expected a list of objects, got {_kind(value)}')
    for index, tool in enumerate(value):
        if not isinstance(tool, dict):
            raise _BadLineError(f"tools[{index}]: expected an object, got {_kind(tool)}")
    return tuple(value)


def _filled(value: Mapping[str, Any], key: str) -> str:
    text = value[key]
    if not isinstance(text, str):
        raise _BadLineError(f'"{key}": expected a string, got {_kind(text)}')
    if not text:
        raise _BadLineError(f'"{key}": expected some text, got an empty string')
    return text


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    if value is None:
        return "null"
    if value == []:
        return "an empty list"
    return names.get(type(value), "a number")
