"""Which modules of a model get a LoRA layer."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

from torch import nn

from loraport.errors import LoraportError, Problems, first_names
from loraport.training.lora.layers import LoraConv, LoraEmbedding, lora_layer_for
from loraport.training.lora.lora_layer import LoraLayer
from loraport.training.options import ALL_LINEAR, LoraOptions

_LAYER_NUMBER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")
_NAMES_SHOWN = 20


def select_targets(model: nn.Module, options: LoraOptions) -> dict[str, type[LoraLayer]]:
    """Return module path → LoRA layer for every module that the options select.

    Names match the end of a path at a dot, a regular expression the whole path, as PEFT 0.21
    does. ``all-linear`` takes every linear layer but the output head.

    Args:
        model: The base.
        options: ``targets``, ``exclude``, ``layers`` and the patterns' keys are looked at.

    Raises:
        LoraportError: If a name, layer number or pattern matches nothing, a named module
            cannot carry LoRA, or nothing is selected; all problems at once.
    """
    refused = _refused_inside_attention(model)
    candidates: dict[str, type[LoraLayer]] = {}
    for path, module in model.named_modules():
        fitting = lora_layer_for(module)
        if getattr(module, "groups", 1) > 1:
            # Loaded where PEFT made one, but not made anew: it could never be merged.
            fitting = f"a {type(module).__name__} with {module.groups} groups"
        if isinstance(fitting, str):
            refused.setdefault(path, fitting)
        elif path not in refused:
            candidates[path] = fitting
    problems = Problems()
    if options.targets == ALL_LINEAR:
        selected = _all_linear(model, candidates)
    else:
        selected = _matching(options.targets, candidates, refused, "targets", problems)
    if options.exclude:
        selected -= _matching(options.exclude, candidates, refused, "exclude", problems)
    if options.layers:
        selected = _in_layers(selected, options.layers, problems)
    for field in ("rank_pattern", "alpha_pattern"):
        _check_patterns(field, getattr(options, field), selected, problems)
    problems.raise_if_any("the modules to adapt cannot be selected")
    if not selected:
        raise LoraportError(
            f"targets {options.targets!r}: expected at least one module, got none after "
            f"exclude and layers; available: {names_of(candidates)}"
        )
    return {path: layer for path, layer in candidates.items() if path in selected}


def _refused_inside_attention(model: nn.Module) -> dict[str, str]:
    """Find modules whose weight is read without calling them: LoRA there would do nothing."""
    return {
        f"{path}.out_proj" if path else "out_proj": "the out_proj of an nn.MultiheadAttention, "
        "which reads its weight without calling it"
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }


def _all_linear(model: nn.Module, candidates: dict[str, type[LoraLayer]]) -> set[str]:
    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    return {
        path
        for path, layer in candidates.items()
        if not issubclass(layer, LoraEmbedding | LoraConv)
        and (head is None or model.get_submodule(path) is not head)
    }


def _matching(
    wanted: tuple[str, ...] | str,
    candidates: dict[str, type[LoraLayer]],
    refused: dict[str, str],
    field: str,
    problems: Problems,
) -> set[str]:
    if isinstance(wanted, str):
        expression = _compiled(wanted, field)
        found = {path for path in candidates if expression.fullmatch(path)}
        if not found:
            problems.add(
                f"{field} {wanted!r}",
                "a regular expression that matches whole module paths",
                "no match",
                f"available: {names_of(candidates)}",
            )
        return found
    selected: set[str] = set()
    for name in wanted:
        found = {path for path in candidates if _ends_with(path, name)}
        if not found:
            unfit = [path for path in refused if _ends_with(path, name)]
            if unfit:
                inside = [path for path in candidates if path.startswith(unfit[0] + ".")]
                remedy = f"name what it holds: {names_of(inside)}" if inside else ""
                expected = "a Linear, Embedding, Conv1d, Conv2d, Conv3d or transformers' Conv1D"
                problems.add(f"{field} {name!r}", expected, refused[unfit[0]], remedy)
            else:
                _unknown(f"{field} {name!r}", name, candidates, problems)
        selected |= found
    return selected


def _unknown(subject: str, name: str, paths: Iterable[str], problems: Problems) -> None:
    names = {path.rpartition(".")[2] for path in paths}
    close = difflib.get_close_matches(name, sorted(names), n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    remedy = f"{hint}available: {names_of(paths)}"
    problems.add(subject, "the name of a module that can carry LoRA", "no such module", remedy)


def _in_layers(selected: set[str], layers: str, problems: Problems) -> set[str]:
    wanted = parse_layers(layers)
    numbers = {path: int(m[1]) for path in selected if (m := _LAYER_NUMBER.search(path))}
    missing = wanted - set(numbers.values())
    if missing:
        there = f"layers {min(numbers.values())} to {max(numbers.values())}" if numbers else "none"
        problems.add(f"layers {layers!r}", there, f"also {_ranges(missing)}", "correct the range")
    return {path for path, number in numbers.items() if number in wanted}


def parse_layers(layers: str) -> frozenset[int]:
    """Read layer numbers.

    Raises:
        LoraportError: If the text is not made of numbers and ranges.

    >>> sorted(parse_layers("0-2,8"))
    [0, 1, 2, 8]
    """
    numbers: set[int] = set()
    for part in layers.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first or last > 100_000:
            raise LoraportError(f"layers {layers!r}: expected ranges like 0-3,8, got {part!r}")
        numbers.update(range(first, last + 1))
    return frozenset(numbers)


def _check_patterns(
    field: str, patterns: Iterable[str], selected: set[str], problems: Problems
) -> None:
    for pattern in patterns:
        expression = _compiled(rf"(.*\.)?({pattern})", f"{field} {pattern!r}")
        if not any(expression.fullmatch(path) for path in selected):
            _unknown(f"{field} {pattern!r}", pattern, selected, problems)


def _compiled(pattern: str, field: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise LoraportError(f"{field}: expected a regular expression, got: {error}") from error


def _ends_with(path: str, name: str) -> bool:
    return path == name or path.endswith("." + name)


def names_of(paths: Iterable[str]) -> str:
    """Return what modules are called, each name once and the first ones alone, or ``none``.

    >>> names_of(["layers.0.q_proj", "layers.1.q_proj", "blocks.0"])
    'q_proj, blocks.0'
    """
    return first_names(dict.fromkeys(_without_number(path) for path in paths), _NAMES_SHOWN)


def _without_number(path: str) -> str:
    """Return the end of a path that names it: ``q_proj``, but ``blocks.0`` in a list."""
    parts = path.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


def _ranges(numbers: Iterable[int]) -> str:
    shown = sorted(numbers)
    return str(shown[0]) if len(shown) == 1 else f"{shown[0]} to {shown[-1]}"
