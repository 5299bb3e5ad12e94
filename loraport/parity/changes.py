"""What adapters do to a PyTorch model: low-rank terms by module, and replaced parameters.

A blend of adapters with strengths ``s_i`` gives each module ``y + Σ s_i (u_i - y)``, where ``y``
is the base's output and ``u_i`` the one with adapter ``i`` alone, at its own scaling. So a DoRA
adapter's strength is not a factor on its scaling, which its norm depends on.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from loraport.adapter import Adapter, Replacement
from loraport.base.storage import is_transposed, stores_in_out
from loraport.base.stored_tensors import stored_tensor, stored_tensors
from loraport.errors import LoraportError, Problems
from loraport.naming import weight_name
from loraport.update import LowRankUpdate
from loraport.variants import lower


@dataclass(frozen=True, eq=False)
class Term:
    """One adapter's update of a module, and its strength in the blend."""

    update: LowRankUpdate
    strength: float


@dataclass(frozen=True, eq=False)
class NewValue:
    """What one adapter puts in place of a parameter, and its strength in the blend."""

    replacement: Replacement
    strength: float


@dataclass(frozen=True, eq=False)
class Changes:
    """All changes that a blend of adapters makes.

    Attributes:
        terms: Module path → the updates that act beside it.
        replaced: Path of a parameter, or of a buffer → its new values.
    """

    terms: Mapping[str, tuple[Term, ...]] = field(default_factory=dict)
    replaced: Mapping[str, tuple[NewValue, ...]] = field(default_factory=dict)


Original = Callable[[str], torch.Tensor]

# The ties of models that `untie` has changed.
_known_ties: weakref.WeakKeyDictionary[nn.Module, dict[str, tuple[str, ...]]] = (
    weakref.WeakKeyDictionary()
)


def changes_of(
    parts: Sequence[tuple[Adapter, float]], model: nn.Module, original: Original | None = None
) -> Changes:
    """Return what adapters with strengths do to a model.

    Args:
        parts: Adapter and strength.
        model: The base they run on.
        original: Gives the parameters and buffers that the adapters were made for, by path, where
            the model has others (a quantized graph's); the model's own unless given.

    Raises:
        LoraportError: Naming everything that does not fit the base.
    """
    original = original or partial(stored_tensor, model)
    ties = ties_of_inputs(model)
    known = set(stored_tensors(model))
    problems = Problems()
    terms: dict[str, list[Term]] = {}
    replaced: dict[str, list[NewValue]] = {}
    for adapter, strength in parts:
        own = _replacements(adapter, known, ties, original, problems)
        for name, replacement in own.items():
            replaced.setdefault(name, []).append(NewValue(replacement, strength))
        for path, module in adapter.modules.items():
            name = weight_name(path)
            try:
                weight = own[name].tensor if _is_whole(own.get(name)) else original(name)
            except AttributeError:
                problems.add(path, "this module in the base", "none")
                continue
            # The model knows; the adapter's one flag may be wrong for some modules.
            turned = stores_in_out(model.get_submodule(path))
            module = replace(module, fan_in_fan_out=turned)
            try:
                is_transposed(module, tuple(weight.shape))
                update = lower(module, weight.detach().cpu())
            except LoraportError as error:
                problems.add(path, "an update that fits the base", str(error))
                continue
            terms.setdefault(path, []).append(Term(update, strength))
    alone = len(parts) == 1 and parts[0][1] == 1.0
    if len(parts) > 1:
        _rows_beside_gains(terms, replaced, model)
    _refuse_products(terms, replaced, alone=alone, to=problems)
    problems.raise_if_any("the adapter does not fit the base")
    return Changes(
        {path: tuple(found) for path, found in terms.items()},
        {name: tuple(found) for name, found in replaced.items()},
    )


def tied_parameters(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return every parameter path that shares its values with others → those others."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return {
        name: tuple(other for other in names if other != name)
        for names in groups.values()
        if len(names) > 1
        for name in names
    }


def untie(model: nn.Module, path: str) -> None:
    """Give a module a weight of its own; trained rows of what it was tied to still act in it.

    Args:
        model: Changed in place.
        path: The module, whose weight others share: what is computed with has one rounded for it.
    """
    _known_ties[model] = ties_of_inputs(model)
    module = model.get_submodule(path)
    module.weight = nn.Parameter(module.get_parameter("weight").detach().clone())


def ties_of_inputs(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return the path of the model's input embedding → those that share its weight.

    Trained rows of it act in all of them; those of a head, or of an encoder's own embedding,
    are its own (PEFT follows ties from the input embedding only).
    """
    if model in _known_ties:
        return _known_ties[model]
    getter = getattr(model, "get_input_embeddings", None)
    try:
        embedding = getter() if getter is not None else None
    except NotImplementedError:
        embedding = None
    first = next((path for path, each in model.named_modules() if each is embedding), None)
    name = None if embedding is None or first is None else weight_name(first)
    return {own: others for own, others in tied_parameters(model).items() if own == name}


def changed_value(base: torch.Tensor, values: Sequence[NewValue]) -> torch.Tensor:
    """Return ``W + Σ s_i (W_i - W)`` in the base's dtype; one value at strength 1 exactly.

    Args:
        base: ``W``, any shape.
        values: Whole tensors of its shape, or some of its rows.
    """
    if len(values) == 1 and values[0].strength == 1.0:
        return _with_rows(base, values[0].replacement).to(base)
    result = base.detach().double()
    for value in values:
        whole = _with_rows(base, value.replacement)
        result = result + value.strength * (whole.to(result) - base.detach().double())
    return result.to(base)


def merged_matrix(base: torch.Tensor, terms: Sequence[Term]) -> torch.Tensor:
    """Return ``W + Σ s_i (gain_i (W + δ_i) - W)``, float64 ``[out, in]``."""
    weight = base.double()
    result = weight
    for term in terms:
        adapted = weight + term.update.delta(torch.float64).to(weight)
        if term.update.gain is not None:
            adapted = adapted * term.update.gain.to(weight)[:, None]
        result = result + term.strength * (adapted - weight)
    return result


def added_bias(terms: Sequence[Term]) -> torch.Tensor | None:
    """Return ``Σ s_i bias_i`` in float64, ``[out]``; ``None`` if none has a bias."""
    found = [t.strength * t.update.bias.double() for t in terms if t.update.bias is not None]
    return torch.stack(found).sum(0) if found else None


def _replacements(
    adapter: Adapter,
    known: set[str],
    ties: Mapping[str, tuple[str, ...]],
    original: Original,
    problems: Problems,
) -> dict[str, Replacement]:
    """Return what an adapter replaces, without copies of the base and with tied token rows."""
    found: dict[str, Replacement] = {}
    for name, replacement in adapter.replacements.items():
        if name not in known:
            problems.add(name, "this parameter in the base", "none")
            continue
        base = original(name)
        whole = replacement.rows is None
        fits = replacement.tensor.shape == base.shape if whole else _rows_fit(replacement, base)
        if not fits:
            expected = f"a tensor {list(base.shape)}" + ("" if whole else ", or rows of it")
            problems.add(name, expected, f"{list(replacement.tensor.shape)}")
            continue
        if whole and torch.equal(replacement.tensor.float(), base.detach().cpu().float()):
            continue
        found[name] = replacement
        if not whole:
            # PEFT lets trained tokens act wherever the embedding's weight is used.
            found.update(dict.fromkeys(ties.get(name, ()), replacement))
    return found


def _rows_fit(replacement: Replacement, base: torch.Tensor) -> bool:
    rows = replacement.rows or ()
    return (
        base.dim() == 2
        and tuple(replacement.tensor.shape) == (len(rows), base.shape[1])
        and all(0 <= row < base.shape[0] for row in rows)
    )


def _is_whole(replacement: Replacement | None) -> bool:
    return replacement is not None and replacement.rows is None


def _with_rows(base: torch.Tensor, replacement: Replacement) -> torch.Tensor:
    tensor = replacement.tensor.to(base.device)
    if replacement.rows is None:
        return tensor
    whole = base.detach().to(torch.promote_types(base.dtype, tensor.dtype), copy=True)
    whole[list(replacement.rows)] = tensor.to(whole)
    return whole


def _rows_beside_gains(
    terms: Mapping[str, list[Term]],
    replaced: dict[str, list[NewValue]],
    model: nn.Module,
) -> None:
    """Let one adapter's trained tokens act beside another's gain, which is not theirs."""
    for path, found in terms.items():
        name = weight_name(path)
        values = replaced.get(name, [])
        gained = any(term.update.gain is not None for term in found)
        if not gained or any(value.replacement.rows is None for value in values):
            continue
        lookup = isinstance(model.get_submodule(path), nn.Embedding)
        for value in replaced.pop(name, []):
            weight = model.get_parameter(name).detach().cpu()
            update = rows_update(value.replacement, weight, lookup)
            found.append(Term(update, value.strength))


def rows_update(replacement: Replacement, weight: torch.Tensor, lookup: bool) -> LowRankUpdate:
    """Return new rows of a weight ``[vocab, dim]`` as a product; of an embedding's transpose."""
    rows = list(replacement.rows or ())
    moved = replacement.tensor.double() - weight[rows].double()  # [n, dim]
    places = torch.zeros(len(rows), weight.shape[0], dtype=torch.float64)  # [n, vocab]
    places[range(len(rows)), rows] = 1
    if lookup:
        return LowRankUpdate(places, moved.T, scaling=1.0)
    return LowRankUpdate(moved, places.T, scaling=1.0)


def _refuse_products(
    terms: Mapping[str, Sequence[Term]],
    replaced: Mapping[str, Sequence[NewValue]],
    *,
    alone: bool,
    to: Problems,
) -> None:
    """Note gains on replaced weights in a blend: their product is no sum of two changes."""
    for path, found in terms.items():
        gained = any(term.update.gain is not None for term in found)
        if gained and weight_name(path) in replaced and not alone:
            to.add(path, "DoRA or a replaced weight", "both", "run one adapter alone at strength 1")
