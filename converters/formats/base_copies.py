"""Copies of base weights that PEFT saves beside LoRA on embeddings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from loraport.adapter import Adapter, Replacement
from loraport.base.checkpoint import Checkpoint


def without_base_copies(adapter: Adapter, directory: Path) -> tuple[Adapter, list[str]]:
    """Return the adapter without whole parameters that equal the base's, and their names.

    PEFT stores the embedding in full whenever LoRA targets it. Where it is the base's own, it
    changes nothing, and a format without room for it can do without.

    Args:
        adapter: The adapter.
        directory: The base it belongs to.

    Raises:
        LoraportError: If the base's weights are damaged.
    """
    whole = [name for name, found in adapter.replacements.items() if found.rows is None]
    if not whole:
        return adapter, []
    base = Checkpoint(directory)
    copies = [
        name for name in whole if name in base and _equals(adapter.replacements[name], base, name)
    ]
    kept = {name: found for name, found in adapter.replacements.items() if name not in copies}
    return replace(adapter, replacements=kept), copies


def _equals(replacement: Replacement, base: Checkpoint, name: str) -> bool:
    if base.info(name).shape != tuple(replacement.tensor.shape):
        return False
    return bool((base.load(name).float() == replacement.tensor.float()).all())
