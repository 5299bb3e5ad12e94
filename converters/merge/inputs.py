"""Read the adapters of a merge, and find out which of them the initial adapter is for."""

from __future__ import annotations

from pathlib import Path

from converters.formats.registry import read_adapter
from converters.merge.options import MergeOptions
from converters.merge.targets import NamedAdapter
from loraport.errors import LoraportError
from loraport.peft_layout import CONFIG_FILE, is_peft
from loraport.peft_layout.config import changes_base, read_config


def read_adapters(options: MergeOptions) -> list[NamedAdapter]:
    """Read every adapter of a merge.

    Raises:
        LoraportError: If one cannot be read, or it is open which of several the initial adapter
            belongs to.
    """
    begun = _begun_with(options)
    return [
        NamedAdapter(
            path,
            read_adapter(
                path,
                base=None if _is_bare(options.base) else options.base,
                initial_adapter=options.initial_adapter if path in begun else None,
            ),
            strength,
        )
        for path, strength in options.adapters
    ]


def _is_bare(base: str) -> bool:
    """Tell whether a base is weights alone, which tell an adapter's reader nothing."""
    path = Path(base).expanduser()
    if path.is_file():
        return path.suffix == ".safetensors"
    return path.is_dir() and not (path / "config.json").is_file()


def _begun_with(options: MergeOptions) -> set[Path]:
    """Return the adapters whose training began with the initial one.

    Those that say how they were initialised tell; PEFT's own recipe for converting has them
    deny it, so a single adapter is taken at the user's word.
    """
    if options.initial_adapter is None:
        return set()
    paths = [path for path, _ in options.adapters]
    begun = {path for path in paths if is_peft(path) and _changed_its_base(path)}
    if begun:
        return begun
    if len(set(paths)) > 1:
        raise LoraportError(
            "--initial-adapter: expected one of the adapters to say that its initialisation "
            "changed the base (init_lora_weights), got none that does; convert the one that it "
            "belongs to first (`loraport convert --to peft --initial-adapter`)"
        )
    return set(paths)


def _changed_its_base(path: Path) -> bool:
    settings = read_config(path / CONFIG_FILE, changed_base=True)
    return changes_base(settings.training.get("init_lora_weights"))
