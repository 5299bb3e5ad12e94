"""Open the base of a merge, whatever holds it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from converters.merge.base import BaseCheckpoint
from converters.merge.gguf_base import open_gguf
from converters.merge.nf4 import dequantized_sources
from converters.merge.sources import Source, StoredSource
from loraport.base_model import gguf_file, read_model_config, resolve_base
from loraport.checkpoint import Checkpoint
from loraport.errors import LoraportError


def open_base(base: str) -> BaseCheckpoint:
    """Open a base for merging.

    Args:
        base: What `loraport.base_model.resolve_base` takes, or a directory or file that holds
            safetensors alone.

    Raises:
        LoraportError: If there is no such base, it is damaged, or it is quantized in a way
            that cannot be dequantized here.
    """
    path = Path(base).expanduser()
    gguf = gguf_file(base)
    if gguf is not None:
        return open_gguf(gguf)
    if path.is_file() and path.suffix == ".safetensors":
        checkpoint, directory = Checkpoint(path), path.parent
        config: dict[str, Any] = {}
    else:
        holds_weights = path.is_dir() and not (path / "config.json").is_file()
        directory = path if holds_weights else resolve_base(base)
        checkpoint = Checkpoint(directory)
        config = {} if holds_weights else read_model_config(directory)
    shards: dict[Path, dict[str, Source]] = {file: {} for file in checkpoint.files}
    for name in sorted(checkpoint, key=lambda name: checkpoint.info(name).start):
        info = checkpoint.info(name)
        shards[info.file][name] = StoredSource(info)
    quantized = _method(config)
    if quantized == "bitsandbytes":
        found = dequantized_sources(checkpoint, shards)
    elif quantized is None:
        found = shards
    else:
        raise LoraportError(
            f"base {base}: expected float weights, bitsandbytes 4-bit or GGUF, got weights "
            f"quantized by {quantized!r}; merge into the float model it was made from"
        )
    inside = {file.relative_to(directory): tensors for file, tensors in found.items()}
    return BaseCheckpoint(directory, inside, checkpoint.metadata, config, quantized)


def _method(config: Mapping[str, Any]) -> str | None:
    settings = config.get("quantization_config")
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method is None and isinstance(settings, dict) and "load_in_4bit" in settings:
        return "bitsandbytes"
    return str(method or "an unknown method")
