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
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.merge.stored_names import Place, StoredNames
from loraport.base.config import read_model_config
from loraport.naming import NameIndex, weight_name


@dataclass(frozen=True)
class Piece:
    """A checkpoint tensor that holds a parameter, or some rows of it or of one of its experts.

    Attributes:
        tensor: Name in the checkpoint.
        expert: Which expert, or ``None`` where the tensor is no single expert's.
        first_row: Where its rows begin among the parameter's or the expert's.
        section: Which of the matrices that lie one under the other it is.
        rows: How many rows it has, where it is not the whole parameter.
    """

    tensor: str
    expert: int | None = None
    first_row: int = 0
    section: int = 0
    rows: int | None = None

    @property
    def whole(self) -> bool:
        """Whether it is the whole parameter."""
        return self.rows is None


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
        grouped: Modules that are convolutions with groups.
        transposed: Parameters of fused experts that are ``[in, out]`` each.
        bare: Matrices ``[out, in]`` of modules that PEFT does not adapt as modules: of routers.
        unsupported: Parameters that are computed from stored tensors in a way that is not
            handled, and those tensors; each of them also stands among ``pieces`` by itself, for
            adapters that name it as it is stored.
        names: The model's rules for stored names, where it is known.
        missing: Parameters that transformers would draw at random, as no tensor holds them.
    """

    pieces: Mapping[str, tuple[Piece, ...]]
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    tied: tuple[tuple[str, ...], ...] = ()
    conv1d: frozenset[str] = frozenset()
    known: bool = False
    model_class: str | None = None
    input_embeddings: frozenset[str] = frozenset()
    embeddings: frozenset[str] = frozenset()
    grouped: frozenset[str] = frozenset()
    transposed: frozenset[str] = frozenset()
    bare: frozenset[str] = frozenset()
    unsupported: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    names: StoredNames | None = None
    missing: tuple[str, ...] = ()

    def place(self, name: str) -> Place | None:
        """Return what a name that is no parameter's stood for in an older model, if anything.

        An adapter trained when each expert was a module of its own has such names.
        """
        place = None if self.names is None else self.names.place(name)
        return place if place and place.handled and place.parameter in self.pieces else None

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
            config = transformers.AutoConfig.from_pretrained(directory, trust_remote_code=False)
            name = model_class_name(config, settings, task_type)
            model_class = getattr(transformers, name, None) if name else None
            if model_class is None:
                return None
            if hasattr(config, "quantization_config"):
                del config.quantization_config
            with torch.device("meta"):
                return model_class(config)
        # A configuration of code that is not here, one that this version does not read, or
        # nonsense, on which each class trips in a way of its own: the names decide then, and
        # whatever they leave open is refused.
        except Exception:
            return None


def _end(get: Callable[[], Any]) -> Any:
    """Return a model's input or output embeddings; models of images may have none to name."""
    try:
        return get()
    except NotImplementedError:
        return None


def _layout_of(model: Any, shapes: Mapping[str, tuple[int, ...]]) -> BaseLayout:
    held = model.state_dict(keep_vars=True)
    state = {name: tuple(tensor.shape) for name, tensor in held.items()}
    names = StoredNames(model, held)
    pieces, unsupported = _pieces(names, shapes, state)
    ties: dict[str, list[str]] = defaultdict(list)
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        if target in state and source in state:
            ties[source].append(target)
    modules = list(model.named_modules())
    ends = [_end(model.get_input_embeddings), _end(model.get_output_embeddings)]
    return BaseLayout(
        pieces=pieces,
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
        grouped=frozenset(path for path, module in modules if _is_grouped(module)),
        transposed=frozenset(
            f"{path}.{name}"
            for path, module in modules
            if getattr(module, "is_transposed", False)
            for name, _ in module.named_parameters(recurse=False)
        ),
        bare=frozenset(weight_name(path) for path, module in modules if _is_bare(module)),
        unsupported=unsupported,
        names=names,
        missing=() if unsupported else _missing(model, held, pieces, ties),
    )


def _missing(
    model: Any,
    held: Mapping[str, Any],
    pieces: Mapping[str, tuple[Piece, ...]],
    ties: Mapping[str, list[str]],
) -> tuple[str, ...]:
    """Return the parameters that nothing is stored of, nor of one that is tied to them.

    Not those that the model's class computes itself, as transformers knows.
    """
    import torch

    there = set(pieces)
    for source, targets in ties.items():
        if not there.isdisjoint((source, *targets)):
            there |= {source, *targets}
    shared = {id(held[name]) for name in there if name in held}
    computed = [re.compile(each) for each in model._keys_to_ignore_on_load_missing or ()]
    return tuple(
        name
        for name, tensor in held.items()
        if isinstance(tensor, torch.nn.Parameter)
        and name not in there
        and id(tensor) not in shared
        and not any(pattern.search(name) for pattern in computed)
    )


def _pieces(
    names: StoredNames, shapes: Mapping[str, tuple[int, ...]], state: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[Piece, ...]], dict[str, tuple[str, ...]]]:
    """Return the pieces of every parameter, and the tensors of those that are not handled."""
    whole: dict[str, list[Piece]] = defaultdict(list)
    parts: dict[str, dict[tuple[int | None, int], str]] = defaultdict(dict)
    sections: dict[str, int] = {}
    unhandled: dict[str, list[str]] = defaultdict(list)
    for name in shapes:
        place = names.place(name)
        if not place.handled:
            unhandled[place.parameter].append(name)
        elif place.whole:
            whole[place.parameter].append(Piece(name))
        else:
            parts[place.parameter][place.expert, place.section] = name
            sections[place.parameter] = place.sections
    for parameter, found in parts.items():
        experts = {expert for expert, _ in found}
        if len(found) != len(experts) * sections[parameter]:
            unhandled[parameter] += found.values()
            continue
        for expert in sorted(experts, key=lambda number: number or 0):
            row = 0
            for section in range(sections[parameter]):
                name = found[expert, section]
                rows = shapes[name][0]
                whole[parameter].append(Piece(name, expert, row, section, rows))
                row += rows
    for tensors in unhandled.values():
        whole.update({name: [Piece(name)] for name in tensors if name not in state})
    pieces = {name: tuple(found) for name, found in whole.items()}
    return pieces, {name: tuple(tensors) for name, tensors in unhandled.items()}


def _is_grouped(module: Any) -> bool:
    import torch

    convolutions = (torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    return isinstance(module, convolutions) and module.groups > 1


def _is_bare(module: Any) -> bool:
    import torch

    adapted = (torch.nn.Linear, torch.nn.Embedding)
    weight = dict(module.named_parameters(recurse=False)).get("weight")
    known = isinstance(module, adapted) or type(module).__name__ == "Conv1D"
    return weight is not None and weight.dim() == 2 and not known


def _is_embedding(module: Any) -> bool:
    import torch

    return isinstance(module, torch.nn.Embedding)


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
