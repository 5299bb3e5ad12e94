"""Which checkpoint tensor holds which parameter of the model.

The two differ: a checkpoint may lack the model's prefix, name things as an older
transformers did, store a mixture's experts one by one where the model holds them fused, and
store one of a tied pair only. transformers itself knows all that; it is asked, on a model
without weights. Where it does not know the model, names must fit, but for a prefix.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loraport.base_model import read_model_config
from loraport.naming import NameIndex, weight_name


@dataclass(frozen=True)
class Piece:
    """A checkpoint tensor that holds a parameter, or the rows of one expert of it.

    Attributes:
        tensor: Name in the checkpoint.
        expert: Which expert, or ``None`` where the tensor is the whole parameter.
        first_row: Where its rows begin among the expert's rows.
    """

    tensor: str
    expert: int | None = None
    first_row: int = 0


@dataclass(frozen=True)
class BaseLayout:
    """Parameters of a model and the tensors they are stored in.

    Attributes:
        pieces: Parameter → where it is stored.
        shapes: Parameter → shape in the model, where the model is known.
        tied: Groups of parameters that are one tensor; the first is the one that is stored.
        conv1d: Modules of transformers' ``Conv1D``, whose weights are stored ``[in, out]``.
        known: transformers knows the model: ``conv1d`` and ``tied`` are complete.
        model_class: Its class, where it is known.
        input_embeddings: Weights that are looked up by token or position.
        embeddings: Parameters with one row per token of the vocabulary.
        unsupported: Parameters that are computed from the stored tensors in a way that is
            not handled.
    """

    pieces: Mapping[str, tuple[Piece, ...]]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: tuple[tuple[str, ...], ...] = ()
    conv1d: frozenset[str] = frozenset()
    known: bool = False
    model_class: str | None = None
    input_embeddings: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()
    unsupported: frozenset[str] = frozenset()

    def index(self) -> NameIndex:
        """Return an index of all parameters."""
        return NameIndex(
            {*self.pieces, *self.shapes, *(name for group in self.tied for name in group)}
        )


def base_layout(
    directory: Path | None, shapes: Mapping[str, tuple[int, ...]], task_type: str | None = None
) -> BaseLayout:
    """Find out how a checkpoint stores its model.

    Args:
        directory: Where the ``config.json`` that names the model lies, if there is one.
        shapes: The checkpoint's tensors and their shapes.
        task_type: PEFT's task type of the adapter, which may ask for another head.
    """
    plain = {name: (Piece(name),) for name in shapes}
    if directory is None:
        return BaseLayout(plain)
    model = _model_without_weights(directory, task_type)
    if model is None:
        return BaseLayout(plain)
    return _layout_of(model, shapes)


def _model_without_weights(directory: Path, task_type: str | None) -> Any:
    import torch
    import transformers

    from converters.merge.heads import model_class_name

    settings = read_model_config(directory)
    with _quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(directory)
            name = model_class_name(config, settings, task_type)
            model_class = getattr(transformers, name, None) if name else None
            if model_class is None:
                return None
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            with torch.device("meta"):
                return model_class(config)
        # A configuration of code that is not here, or one that this version does not read:
        # the names decide then, and whatever they leave open is refused.
        except (
            ValueError,
            OSError,
            KeyError,
            AttributeError,
            TypeError,
            ImportError,
            RuntimeError,
        ):
            return None


def _layout_of(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> BaseLayout:
    state = {name: tuple(tensor.shape) for name, tensor in model.state_dict(keep_vars=True).items()}
    pieces: dict[str, list[Piece]] = defaultdict(list)
    unsupported: set[str] = set()
    for name, target, converter, pattern in _renamed(model, shapes):
        if converter is None:
            pieces[target].append(Piece(name))
            continue
        piece = _expert_piece(name, pattern, converter, shapes)
        if piece is None:
            unsupported.add(target)
            pieces[target].append(Piece(name))
        else:
            pieces[target].append(piece)
    ties: dict[str, list[str]] = defaultdict(list)
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in state and source in state:
            ties[source].append(target)
    modules = list(model.named_modules())
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]
    return BaseLayout(
        pieces={name: tuple(found) for name, found in pieces.items()},
        shapes=state,
        tied=tuple((source, *targets) for source, targets in ties.items()),
        conv1d=frozenset(path for path, module in modules if type(module).__name__ == "Conv1D"),
        known=True,
        model_class=type(model).__name__,
        input_embeddings=frozenset(
            weight_name(path) for path, module in modules if _is_embedding(module)
        ),
        embeddings=frozenset(
            weight_name(path) for path, module in modules if any(module is end for end in ends)
        ),
        unsupported=frozenset(unsupported),
    )


def _is_embedding(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Embedding)


def _renamed(
    model: Any, shapes: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, str, Any, str | None]]:
    """Yield checkpoint name, parameter, and the converter and its pattern where one applies."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    by_pattern = {
        pattern: converter for converter in converters for pattern in converter.source_patterns
    }
    state = model.state_dict(keep_vars=True)
    for name in shapes:
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, state
        )
        yield name, target, by_pattern.get(pattern), pattern


def _expert_piece(
    name: str, pattern: str | None, converter: Any, shapes: Mapping[str, tuple[int, ...]]
) -> Piece | None:
    """Return where one expert's matrix goes in the fused parameter.

    Handled: experts stacked along the first dimension, each possibly made of several matrices
    one under the other.
    """
    steps = [type(step).__name__ for step in converter.operations]
    dims = [getattr(step, "dim", None) for step in converter.operations]
    if (steps, dims) not in (
        (["MergeModulelist"], [0]),
        (["MergeModulelist", "Concatenate"], [0, 1]),
    ):
        return None
    patterns = list(converter.source_patterns)
    found = re.search(_as_regex(pattern or ""), name)
    if found is None or not found.groups():
        return None
    expert = int(found[1])
    above = 0
    for earlier in patterns[: patterns.index(pattern)]:
        partner = (
            name[: found.start()]
            + earlier.lstrip("^").rstrip("$").replace("\\", "").replace("*", str(expert), 1)
            + name[found.end() :]
        )
        if partner not in shapes:
            return None
        above += shapes[partner][0]
    return Piece(name, expert, above)


def _as_regex(pattern: str) -> str:
    return re.escape(pattern.replace("\\", "").lstrip("^").rstrip("$")).replace(r"\*", r"(\d+)", 1)


@contextmanager
def _quiet() -> Iterator[None]:
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
