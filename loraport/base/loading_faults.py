"""What keeps transformers from loading a base, in words that name it."""

from __future__ import annotations

from collections.abc import Iterable

from loraport.errors import Problems


def tied_shapes(error: Exception) -> str | None:
    """Say that tensors which a configuration ties are of two shapes.

    transformers compares them, and of one whose shape is not the model's it has no numbers.

    Returns:
        ``None`` where the error is another.
    """
    if not isinstance(error, NotImplementedError) or "aten::equal" not in str(error):
        return None
    return (
        "expected one shape of the tensors that config.json ties (tie_word_embeddings), got "
        "several, such as a head of another vocabulary; fetch all files again, config.json too"
    )


def own_code(error: Exception) -> str | None:
    """Say that code which a base brings is not run, where transformers asks for leave to run it.

    Returns:
        ``None`` where the error is another.
    """
    if "trust_remote_code" not in str(error):
        return None
    return (
        "expected a kind that transformers has, got one that is Python code in the base's own "
        "directory (auto_map), which loraport never runs; convert the base to a kind that "
        "transformers has"
    )


def require_shapes(
    base: str, mismatched: Iterable[tuple[str, tuple[int, ...], tuple[int, ...]]]
) -> None:
    """Refuse a base whose tensors have other shapes than its configuration says.

    Args:
        base: What the user calls it.
        mismatched: Name, shape in the files and shape in the model of each such tensor.

    Raises:
        LoraportError: Naming all of them.
    """
    problems = Problems()
    for name, stored, expected in sorted(mismatched, key=lambda each: each[0]):
        problems.add(name, f"shape {list(expected)}, as config.json says", str(list(stored)))
    problems.raise_if_any(f"base {base}: cannot be loaded; fetch all files again, config.json too")
