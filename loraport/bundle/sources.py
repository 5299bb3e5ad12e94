"""``sources.json``: where a bundle's base and adapters came from on this machine.

Only ``loraport verify`` reads it, to find what to compare with. It is no part of the
manifest: runners need it not, and it may be deleted before shipping.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from loraport.output import new_file

SOURCES_FILE = "sources.json"


def record_base(bundle: Path, base: str) -> None:
    """Remember the base's directory or name."""
    _write(bundle, {**_read(bundle), "base": base})


def record_adapter(bundle: Path, name: str, path: str) -> None:
    """Remember where an adapter was read from."""
    sources = _read(bundle)
    _write(bundle, {**sources, "adapters": {**_adapters(sources), name: path}})


def base_source(bundle: Path) -> str | None:
    """Return where the base came from, if that is known."""
    base = _read(bundle).get("base")
    return base if isinstance(base, str) else None


def adapter_source(bundle: Path, name: str) -> str | None:
    """Return where an adapter came from, if that is known."""
    path = _adapters(_read(bundle)).get(name)
    return path if isinstance(path, str) else None


def _read(bundle: Path) -> dict[str, Any]:
    try:
        sources = json.loads((bundle / SOURCES_FILE).read_bytes())
    except (OSError, ValueError):
        return {}
    return sources if isinstance(sources, dict) else {}


def _adapters(sources: dict[str, Any]) -> dict[str, Any]:
    found = sources.get("adapters")
    return found if isinstance(found, dict) else {}


def _write(bundle: Path, sources: dict[str, Any]) -> None:
    with new_file(bundle / SOURCES_FILE, force=True) as partial:
        partial.write_text(json.dumps(sources, indent=1) + "\n")
