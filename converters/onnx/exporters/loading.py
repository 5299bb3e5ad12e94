"""Load a base that is exported, and see to what its files lack."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from converters.merge.layout import BaseLayout, base_layout
from loraport.base.checkpoint import Checkpoint
from loraport.base.config import architecture, is_causal_lm, read_model_config
from loraport.base.loading import load_causal_lm, load_model_as_it_is
from loraport.errors import LoraportError, first_names

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_NAMED = 5


def load_exported(directory: Path, progress: Callable[[str], None]) -> PreTrainedModel:
    """Load a base; of one that is no decoder, say which weights transformers drew at random.

    A decoder's logits need all of them. An encoder's pooler may well be absent and of no use.

    Args:
        directory: Model directory in the Hugging Face layout.
        progress: Told what the files lack, and of a class that was guessed.

    Raises:
        LoraportError: If it cannot be loaded, or is a decoder whose files lack weights.
    """
    if is_causal_lm(directory):
        return load_causal_lm(str(directory))
    model, missing = load_model_as_it_is(str(directory))
    if not architecture(directory):
        progress(
            "the base's config.json names no class (architectures): exported as "
            f"{type(model).__name__}, without a head"
        )
    if missing:
        progress(
            f"the base's files lack {first_names(missing, _NAMED)}: drawn at random, so "
            "outputs that depend on them mean nothing unless an adapter stores them (--replace)"
        )
    return model


def require_weights(directory: Path) -> None:
    """Refuse a decoder whose files lack weights, by what their headers say.

    What builds a graph may take minutes, and draws them at random. Where the headers leave a doubt,
    the model is loaded, which tells.

    Args:
        directory: Model directory in the Hugging Face layout.

    Raises:
        LoraportError: If weights are missing, have another shape, or lie in damaged files, or
            ``config.json`` has no ``model_type``, which the builder needs.
    """
    _require_model_type(directory)
    if not any(directory.glob("*.safetensors*")):
        return  # pickled ones, which have no headers
    named = None
    try:
        if _whole(directory):
            return
    except LoraportError as error:
        named = error
    try:
        load_causal_lm(str(directory))
    except LoraportError as error:
        raise named or error from error


def _require_model_type(directory: Path) -> None:
    if read_model_config(directory).get("model_type"):
        return
    import transformers

    model_class = getattr(transformers, architecture(directory), None)
    kind = getattr(getattr(model_class, "config_class", None), "model_type", None)
    remedy = f'write "model_type": "{kind}" into it' if kind else "fetch it again"
    raise LoraportError(
        f"{directory / 'config.json'}: model_type: expected the kind of model, by which it is "
        f"built, got none; {remedy}"
    )


def _whole(directory: Path) -> bool:
    """Tell whether the files hold a tensor of the right shape for each of a model's parameters."""
    checkpoint = Checkpoint(directory)
    shapes = {name: checkpoint.info(name).shape for name in checkpoint}
    layout = base_layout(directory, shapes)
    return not layout.missing and _fitting(layout, shapes)


def _fitting(layout: BaseLayout, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return all(
        shapes[pieces[0].tensor] == layout.shapes.get(name, shapes[pieces[0].tensor])
        for name, pieces in layout.pieces.items()
        if len(pieces) == 1 and pieces[0].whole
    )
