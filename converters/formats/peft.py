"""PEFT's layout, loraport's own: it holds everything an `Adapter` can say."""

from __future__ import annotations

from pathlib import Path

from converters.formats.features import Feature
from converters.formats.format import AdapterFormat, FormatContext
from loraport.adapter import Adapter
from loraport.peft_layout import CONFIG_FILE, is_peft, read_peft, write_peft
from loraport.peft_layout.initial import relative_to_initial
from loraport.peft_layout.read import PICKLED_FILE, WEIGHTS_FILE


def detect(path: Path) -> bool:
    """Tell whether ``path`` is a directory with PEFT's configuration or weights."""
    if not is_peft(path):
        return False
    return (
        any((path / name).is_file() for name in (WEIGHTS_FILE, PICKLED_FILE))
        or not (path / "adapters.safetensors").is_file()
    )


def read(path: Path, context: FormatContext) -> Adapter:
    """Read an adapter directory; see `loraport.peft_layout.read_peft`."""
    if context.initial_adapter is None:
        return read_peft(path)
    trained = read_peft(path, changed_base=True)
    return relative_to_initial(trained, read_peft(context.initial_adapter, changed_base=True))


def write(adapter: Adapter, path: Path, context: FormatContext) -> None:
    """Write an adapter directory; see `loraport.peft_layout.write_peft`."""
    write_peft(adapter, path, force=context.force)


FORMAT = AdapterFormat(
    name="peft",
    summary=f"PEFT's directory ({CONFIG_FILE}, {WEIGHTS_FILE})",
    holds=frozenset(Feature),
    detect=detect,
    read=read,
    write=write,
)
