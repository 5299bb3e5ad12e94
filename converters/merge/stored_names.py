"""Where a checkpoint's tensor goes in the model, as transformers itself loads it.

A name may be an older version's, and a mixture's experts may be stored one by one, each as
several matrices, where the model holds one fused parameter.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Place:
    """What a stored name stands for in the model.

    Attributes:
        parameter: The parameter.
        expert: Which expert of it, or ``None`` where the tensor is no single expert's.
        section: Which of the matrices that lie one under the other in the parameter (a gate's
            above an up projection's), from 0.
        sections: How many of them there are.
        handled: The tensor is the parameter, or rows of it, as they are; not, say, something
            that is transposed or cut up when it is loaded.
    """

    parameter: str
    expert: int | None = None
    section: int = 0
    sections: int = 1
    handled: bool = True

    @property
    def whole(self) -> bool:
        """Whether it is the whole parameter."""
        return self.expert is None and self.sections == 1


class StoredNames:
    """A model's rules from stored names to parameters.

    Args:
        model: A transformers model, weights not needed.
        state: Its parameters and buffers by name.
    """

    def __init__(self, model: Any, state: Mapping[str, Any]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        transforms = get_model_conversion_mapping(model)
        self._renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
        self._converters = [each for each in transforms if isinstance(each, WeightConverter)]
        self._by_pattern = {
            pattern: converter
            for converter in self._converters
            for pattern in converter.source_patterns
        }
        self._prefix = model.base_model_prefix
        self._state = state

    def place(self, name: str) -> Place:
        """Return what a stored name stands for; the parameter need not exist."""
        from transformers.core_model_loading import rename_source_key

        target, pattern = rename_source_key(
            name, self._renamings, self._converters, self._prefix, self._state
        )
        converter = self._by_pattern.get(pattern)
        if converter is None or pattern is None:
            return Place(target)
        return _converted(name, target, pattern, converter)


def _converted(name: str, target: str, pattern: str, converter: Any) -> Place:
    steps = [
        (type(step).__name__, getattr(step, "dim", None), getattr(step, "check_dims", False))
        for step in converter.operations
    ]
    patterns = list(converter.source_patterns)
    one_target = len(converter.target_patterns) == 1
    if not one_target:
        return Place(target, handled=False)
    if steps == [("Transpose", None, True)]:
        # Turned only where the shape asks for it, and shapes decide here as well.
        return Place(target)
    if steps == [("Concatenate", 0, False)] and "*" not in pattern:
        return Place(target, None, patterns.index(pattern), len(patterns))
    if steps not in (
        [("MergeModulelist", 0, False)],
        [("MergeModulelist", 0, False), ("Concatenate", 1, False)],
    ):
        return Place(target, handled=False)
    found = re.search(_as_regex(pattern), name)
    if found is None or not found.groups():
        return Place(target, handled=False)
    return Place(target, int(found[1]), patterns.index(pattern), len(patterns))


def _as_regex(pattern: str) -> str:
    return re.escape(pattern.replace("\\", "").lstrip("^").rstrip("$")).replace(r"\*", r"(\d+)", 1)
