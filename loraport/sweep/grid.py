"""The candidates of a sweep: every combination of some ranks, targets, alphas, rates, layers."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from loraport.errors import LoraportError, Problems
from loraport.plain_options import store_plain
from loraport.sweep.trial import Trial
from loraport.training.options import ALL_LINEAR, LoopOptions, LoraOptions

MOST_TRIALS = 256
_LONGEST_LABEL = 48
_TIMES_RANK = re.compile(r"(\d+(?:\.\d*)?|\.\d+)r")
_NAME = re.compile(r"[\w.-]+")


@dataclass(frozen=True)
class Grid:
    """The values tried; every combination is a candidate.

    Attributes:
        rank: Ranks.
        alpha: Alphas: numbers, or ``"2r"`` for twice the rank.
        targets: Each as `LoraOptions.targets` has it.
        layers: Each as `LoraOptions.layers` has it.
        learning_rate: Peak learning rates.
    """

    rank: tuple[int, ...] = (LoraOptions.rank,)
    alpha: tuple[float | str, ...] = ("2r",)
    targets: tuple[tuple[str, ...] | str, ...] = (ALL_LINEAR,)
    layers: tuple[str, ...] = ("",)
    learning_rate: tuple[float, ...] = (LoopOptions.learning_rate,)

    def __post_init__(self) -> None:
        store_plain(self)
        problems = Problems()
        for each in fields(self):
            values = getattr(self, each.name)
            if not isinstance(values, tuple | list):
                problems.add(each.name, "a list of values, such as (1, 2)", repr(values))
            elif not values:
                problems.add(each.name, "at least one value", "none")
            elif any(value in values[:at] for at, value in enumerate(values)):
                problems.add(each.name, "each value once", _shown(values))
        problems.raise_if_any("the grid cannot be used")
        for rank in self.rank:
            if isinstance(rank, bool) or not isinstance(rank, int):
                problems.add("rank", "a whole number", repr(rank))
        for rate in self.learning_rate:
            if isinstance(rate, bool) or not isinstance(rate, int | float):
                problems.add("learning_rate", "a number", repr(rate))
        for alpha in self.alpha:
            number = isinstance(alpha, int | float) and not isinstance(alpha, bool)
            if not number and not (isinstance(alpha, str) and _TIMES_RANK.fullmatch(alpha)):
                problems.add("alpha", "a number, or one times the rank like 2r", repr(alpha))
        problems.raise_if_any("the grid cannot be used")

    def trials(self, lora: LoraOptions) -> tuple[Trial, ...]:
        """Return every combination, named after what sets it apart.

        Args:
            lora: What all candidates share.

        Raises:
            LoraportError: If there are too many, two are the same, or a value is out of range.
        """
        count = len(self.rank) * len(self.alpha) * len(self.targets) * len(self.layers)
        count *= len(self.learning_rate)
        if count > MOST_TRIALS:
            raise LoraportError(
                f"the grid: expected at most {MOST_TRIALS} candidates, got {count}; try few values "
                "of each first, then more around the best"
            )
        trials: dict[str, Trial] = {}
        problems = Problems()
        for targets, layers, rank, alpha, rate in itertools.product(
            self.targets, self.layers, self.rank, self.alpha, self.learning_rate
        ):
            try:
                LoopOptions(learning_rate=rate)
                options = replace(
                    lora, rank=rank, alpha=_alpha(alpha, rank), targets=targets, layers=layers
                )
            except LoraportError as error:
                problems.add(f"rank {rank}, alpha {alpha}, learning rate {rate}", "it usable",
                             str(error).replace("\n", " "))  # fmt: skip
                continue
            name = self._name(options, rate)
            if name in trials:
                problems.add(name, "candidates that differ", "the same one twice")
            trials[name] = Trial(name, options, float(rate))
        problems.raise_if_any("the grid cannot be used")
        return tuple(trials.values())

    def _name(self, options: LoraOptions, rate: float) -> str:
        parts = [f"r{options.rank}", f"a{options.effective_alpha:g}", f"lr{rate:g}"]
        if len(self.targets) > 1:
            parts.append(_label("targets", options.targets, self.targets))
        if len(self.layers) > 1:
            parts.append(_label("layers", options.layers or "all", self.layers))
        return "-".join(parts)


def read_grid(path: Path) -> dict[str, Any]:
    """Read a grid from TOML or JSON: an object of values or lists of values.

    Args:
        path: ``.toml`` or ``.json``, with any of the fields of `Grid`; a list among ``targets``
            is a list of module names.

    Raises:
        LoraportError: If it cannot be read or says something else.
    """
    try:
        text = path.read_text()
        document = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except (OSError, ValueError) as error:
        raise LoraportError(f"grid {path}: expected TOML or JSON, got: {error}") from error
    known = [each.name for each in fields(Grid)]
    problems = Problems()
    if not isinstance(document, Mapping) or not document:
        raise LoraportError(f"grid {path}: expected some of {', '.join(known)}, got none of them")
    found: dict[str, Any] = {}
    for name, value in document.items():
        values = value if isinstance(value, list) else [value]
        if name not in known:
            problems.add(name, f"one of {', '.join(known)}", "another name")
        elif name == "targets":
            found[name] = tuple(_targets(each, problems) for each in values)
        elif name == "layers" and not all(isinstance(each, str) for each in values):
            problems.add(name, 'texts like "0-3,8"', repr(value))
        else:
            found[name] = tuple(values)
    problems.raise_if_any(f"grid {path} cannot be used")
    return found


def _targets(value: Any, problems: Problems) -> tuple[str, ...] | str:
    if isinstance(value, list) and value and all(isinstance(each, str) for each in value):
        return tuple(value)
    if not isinstance(value, str) or not value:
        problems.add("targets", "a text or a list of module names", repr(value))
    return str(value)


def _alpha(alpha: float | str, rank: int) -> float:
    if isinstance(alpha, str):
        return float(alpha.removesuffix("r")) * rank
    return float(alpha)


def _label(axis: str, value: Sequence[str] | str, values: Sequence[Any]) -> str:
    """Return a part of a directory's name: the value where that is short and plain."""
    text = value if isinstance(value, str) else "+".join(value)
    plain = text.replace(",", "+")
    if len(plain) <= _LONGEST_LABEL and _NAME.fullmatch(plain.replace("+", "")):
        return plain if axis == "targets" else f"{axis}{plain}"
    return f"{axis}{values.index(value) + 1}"


def _shown(values: Sequence[Any]) -> str:
    return ", ".join(str(value) for value in values)
