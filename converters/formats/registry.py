"""Every adapter format there is, found by looking: a new format is one new file.

A format is a module directly in this package with an attribute ``FORMAT``
(`converters.formats.format.AdapterFormat`).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping
from pathlib import Path

import converters.formats
from converters.formats.base_copies import without_base_copies
from converters.formats.features import Feature
from converters.formats.foreign import foreign_adapter
from converters.formats.format import AdapterFormat, FormatContext
from loraport.adapter import Adapter, require_adapter
from loraport.errors import LoraportError, Problems
from loraport.naming import is_module_path
from loraport.output import refuse_existing


@functools.cache
def adapter_formats() -> Mapping[str, AdapterFormat]:
    """Return every format by name, in alphabetical order of their files."""
    formats: dict[str, AdapterFormat] = {}
    for module in pkgutil.iter_modules(converters.formats.__path__, "converters.formats."):
        if module.ispkg or module.name == __name__:
            continue
        found = getattr(importlib.import_module(module.name), "FORMAT", None)
        if isinstance(found, AdapterFormat):
            formats[found.name] = found
    return formats


def detect_format(path: Path) -> AdapterFormat:
    """Return the format of the adapter at ``path``, judged by its content.

    Raises:
        LoraportError: If there is nothing at ``path``, it is in no known format (what it
            is, is said where its names tell), or the adapter lies beside or below it; then it is
            said where.
    """
    if not path.exists():
        raise LoraportError(f"adapter {path}: expected a file or directory, got none there")
    found = _detected(path)
    if found is not None:
        return found
    inside = (
        sorted(p for p in path.iterdir() if p.is_dir() and _detected(p)) if path.is_dir() else []
    )
    if inside:
        raise LoraportError(
            f"adapter {path}: expected one adapter, got a directory of adapters; name one of "
            f"{', '.join(map(str, inside))}"
        )
    around = None if path.is_dir() else _detected(path.parent)
    if around is not None:
        raise LoraportError(
            f"adapter {path}: expected an adapter, got a file of one that {around.name} keeps in a "
            f"directory; give {path.parent}"
        )
    foreign = foreign_adapter(path)
    if foreign is not None:
        kind, remedy = foreign
        raise LoraportError(
            f"adapter {path}: expected one of the known formats, got {kind}; {remedy}"
        )
    known = "; ".join(f"{name}: {known.summary}" for name, known in adapter_formats().items())
    raise LoraportError(
        f"adapter {path}: expected one of the known formats ({known}), got none of them; "
        "check the path, and that the files are whole"
    )


def _detected(path: Path) -> AdapterFormat | None:
    return next((each for each in adapter_formats().values() if each.detect(path)), None)


def read_adapter(
    path: Path | str, *, base: str | None = None, initial_adapter: Path | None = None
) -> Adapter:
    """Read an adapter in any format.

    Args:
        path: File or directory.
        base: The base model, for formats that need it to tell module names.
        initial_adapter: The adapter as it was before its training, where its initialisation
            changed the base; both in PEFT's layout.

    Raises:
        LoraportError: If it cannot be read; all problems at once.
    """
    path = Path(path)
    found = detect_format(path)
    if initial_adapter is not None and found.name != "peft":
        raise LoraportError(
            f"adapter {path}: expected PEFT's layout beside an initial adapter, got {found.name}; "
            "other formats cannot say how an adapter was initialised"
        )
    adapter = found.read(path, FormatContext(base=base, initial_adapter=initial_adapter))
    problems = Problems()
    for name in (*adapter.modules, *adapter.replacements):
        if not is_module_path(name):
            problems.add(repr(name), "a dotted module path", "another name", "fetch it again")
    problems.raise_if_any(f"adapter {path} cannot be read")
    return adapter


def write_adapter(
    adapter: Adapter,
    path: Path | str,
    format_name: str,
    *,
    base: str | None = None,
    force: bool = False,
) -> list[str]:
    """Write an adapter in the named format; the output appears whole or not at all.

    Args:
        adapter: What to write.
        path: The new file or directory.
        format_name: One of `adapter_formats`.
        base: The base model, for formats that need its names or head counts.
        force: Replace an existing output.

    Returns:
        Names of parameters that were left out because they equal the base's own.

    Raises:
        LoraportError: If there is no such format, it cannot hold the adapter (everything it
            cannot hold is named), or ``path`` exists.
    """
    require_adapter(adapter)
    chosen = adapter_formats().get(format_name)
    if chosen is None:
        known = ", ".join(adapter_formats())
        raise LoraportError(f"format {format_name!r}: expected one of {known}")
    path = Path(path)
    refuse_existing(path, force=force)
    context = FormatContext(base=base, force=force)
    copies: list[str] = []
    if Feature.WHOLE_PARAMETER not in chosen.holds and adapter.replacements:
        directory = context.base_directory(adapter.base_model)
        if directory is not None:
            adapter, copies = without_base_copies(adapter, directory)
    chosen.write(adapter, path, context)
    return copies
