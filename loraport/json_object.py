"""JSON objects that come from outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loraport.errors import LoraportError

_MAX_BYTES = 64 << 20  # configurations are kilobytes; anything near this is not one


def parse_json_object(text: str | bytes, source: str) -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        text: The JSON text.
        source: Where it is from, for the message.

    Raises:
        LoraportError: If it is not JSON, not an object, or a key occurs twice.
    """
    try:
        parsed = json.loads(text, object_pairs_hook=distinct_keys)
    except (ValueError, RecursionError) as error:
        raise LoraportError(f"{source}: expected JSON, got: {error}") from error
    if not isinstance(parsed, dict):
        raise LoraportError(f"{source}: expected a JSON object, got {type(parsed).__name__}")
    return parsed


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a file that holds a JSON object.

    Raises:
        LoraportError: If it cannot be read or `parse_json_object` refuses it.
    """
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise LoraportError(f"{path}: expected at most {_MAX_BYTES} bytes of JSON")
        return parse_json_object(path.read_bytes(), str(path))
    except OSError as error:
        raise LoraportError(f"{path}: cannot be read: {error.strerror or error}") from error


def distinct_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its keys and values; the hook of `json.loads` that refuses a key twice.

    Raises:
        ValueError: Naming the keys that occur twice.
    """
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ValueError(f"keys that occur twice: {', '.join(twice)}")
    return result
