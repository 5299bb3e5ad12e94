"""What an adapter format is: the one protocol that every format file fills in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from converters.formats.features import Feature
from loraport.adapter import Adapter
from loraport.base.finding import resolve_base


@dataclass(frozen=True)
class FormatContext:
    """What a format may need beside its own files.

    Attributes:
        base: How the user names the base model, see `loraport.base.finding.resolve_base`.
        force: Replace an existing output.
        initial_adapter: The adapter as it was before its training, for initialisations that
            change the base (PiSSA, OLoRA, CorDA, LoRA-GA).
    """

    base: str | None = None
    force: bool = False
    initial_adapter: Path | None = None

    def base_directory(self, recorded: str | None = None) -> Path | None:
        """Return the base's directory, or ``None`` where nobody named one that is here.

        Args:
            recorded: The base that the adapter itself names. It is used only where it is a
                local model directory: converting a file never downloads a model unasked.

        Raises:
            LoraportError: If ``base`` is given and there is no such base.
        """
        if self.base is not None:
            return resolve_base(self.base)
        if recorded and (Path(recorded) / "config.json").is_file():
            return Path(recorded)
        return None


@dataclass(frozen=True)
class AdapterFormat:
    """One format; a file directly in ``converters`` exposes it as ``FORMAT``.

    Attributes:
        name: What ``--to`` calls it.
        summary: What it is and who reads it, in one line.
        holds: The features it can express; everything else is refused when writing.
        detect: Tells by content whether a path is in this format; never raises.
        read: Reads a path it detected.
        write: Writes a path that appears whole or not at all.
    """

    name: str
    summary: str
    holds: frozenset[Feature]
    detect: Callable[[Path], bool]
    read: Callable[[Path, FormatContext], Adapter]
    write: Callable[[Adapter, Path, FormatContext], None]
