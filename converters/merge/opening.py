"""Open the base of a merge, whatever holds it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from converters.merge.base import BaseCheckpoint
from converters.merge.compressed_tensors import FORMATS, compressed_weights
from converters.merge.fp8 import fp8_weights
from converters.merge.gguf_base import open_gguf
from converters.merge.int8 import add_int8_weights
from converters.merge.mxfp4 import mxfp4_weights
from converters.merge.nf4 import add_nf4_weights
from converters.merge.quantized import Dequantized, QuantizedCheckpoint, computing_dtype
from converters.merge.sources import Source, StoredSource
from loraport.base.checkpoint import Checkpoint
from loraport.base.config import read_model_config
from loraport.base.finding import gguf_file, resolve_base
from loraport.errors import LoraportError


def open_base(base: str) -> BaseCheckpoint:
    """Open a base for merging.

    Args:
        base: What `loraport.base.finding.resolve_base` takes, or a directory or file that holds
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
    if quantized is not None:
        shards = _dequantized(base, quantized, checkpoint, config).shards(shards, checkpoint.path)
    inside = {file.relative_to(directory): tensors for file, tensors in shards.items()}
    return BaseCheckpoint(directory, inside, checkpoint.metadata, config, quantized)


def _bitsandbytes_weights(quantized: QuantizedCheckpoint) -> Dequantized:
    result = Dequantized()
    add_nf4_weights(quantized, result)
    add_int8_weights(quantized, result)
    return result


_BITS = {"load_in_4bit", "load_in_8bit"}
_READERS: Mapping[str, Callable[[QuantizedCheckpoint], Dequantized]] = {
    "bitsandbytes": _bitsandbytes_weights,
    "fp8": fp8_weights,
    "mxfp4": mxfp4_weights,
    "compressed-tensors": compressed_weights,
}


def _dequantized(
    base: str, method: str, checkpoint: Checkpoint, config: Mapping[str, Any]
) -> Dequantized:
    settings = config["quantization_config"]
    form = settings.get("format") if method == "compressed-tensors" else None
    if method not in _READERS or (method == "compressed-tensors" and form not in FORMATS):
        raise LoraportError(
            f"base {base}: expected float weights, GGUF, or weights quantized by bitsandbytes, as "
            f"fp8 or mxfp4, or by compressed-tensors to 8 bits ({', '.join(FORMATS)}), got weights "
            f"quantized by {method!r}{f' as {form!r}' if form else ''}; merge into the float model "
            "it was made from"
        )
    return _READERS[method](QuantizedCheckpoint(checkpoint, settings, computing_dtype(config)))


def _method(config: Mapping[str, Any]) -> str | None:
    settings = config.get("quantization_config")
    if not settings:
        return None
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    if method is None and isinstance(settings, dict) and settings.keys() & _BITS:
        return "bitsandbytes"
    return str(method or "an unknown method")
