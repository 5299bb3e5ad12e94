"""Load a base as PyTorch models and tokenizers are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraport.base.bitsandbytes_weights import dequantized_weight
from loraport.base.config import architecture, decoder_class, is_causal_lm, read_model_config
from loraport.base.finding import resolve_base
from loraport.base.loading_faults import own_code, require_shapes, tied_shapes
from loraport.errors import LoraportError
from loraport.fingerprint import BaseFingerprint, fingerprint

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_FEWEST_WORDS = 2  # T5's empty tokenizer has one: the space


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
        reason = own_code(error) or tied_shapes(error) or str(error)
        raise LoraportError(f"base {base}: cannot be loaded: {reason}") from error
    require_shapes(base, loading["mismatched_keys"])
    return model.to(device).eval(), tuple(sorted(loading["missing_keys"]))


def _model_class(base: str, directory: Path) -> type[PreTrainedModel] | None:
    import transformers

    model_class: type[PreTrainedModel] | None
    model_class = getattr(transformers, architecture(directory), None)
    remedy = decoder_class(directory)
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
        remedy = "" if found else decoder_class(directory)
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
