"""PEFT's ``target_parameters``: LoRA on bare parameters, above all fused experts.

PEFT wraps a module once for each of its targeted parameters, the first one defined innermost,
and the keys say only how deep (``experts.base_layer.lora_A`` lies under ``experts.lora_A``).
Whatever else the module holds lies inside all its wrappers: where ``mlp.experts`` is a targeted
parameter, ``mlp.base_layer.gate`` is the module ``mlp.gate``.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loraport.errors import Problems
from loraport.naming import path_endings

_WRAPPED = ".base_layer"
# The order in which models define the parameters of fused experts.
_DEFINED = ("gate_up_proj", "gate_proj", "up_proj", "w1", "w3", "down_proj", "w2")


def unwrapped(module_path: str) -> tuple[str, int]:
    """Return the module and how many wrappers of it lie outside of this one.

    >>> unwrapped("mlp.experts.base_layer")
    ('mlp.experts', 1)
    """
    depth = 0
    while module_path.endswith(_WRAPPED):
        module_path = module_path.removesuffix(_WRAPPED)
        depth += 1
    return module_path, depth


def wrapped(module_path: str, depth: int) -> str:
    """Return PEFT's path of the wrapper with ``depth`` others outside of it."""
    return module_path + _WRAPPED * depth


def inside_wrappers(path: str, depths: Mapping[str, int]) -> str:
    """Return PEFT's path of a module or parameter of the model, inside of what is wrapped.

    Args:
        path: Path in the model.
        depths: Wrapped module → number of its wrappers.

    >>> inside_wrappers("mlp.gate", {"mlp": 2})
    'mlp.base_layer.base_layer.gate'
    """
    for at in _dots(path):
        if path[:at] in depths:
            return wrapped(path[:at], depths[path[:at]]) + path[at:]
    return path


@dataclass(frozen=True)
class WrappedParameters:
    """What the wrappers in an adapter's keys are for.

    Attributes:
        parameters: PEFT's path of a wrapper → the parameter's path in the model.
        depths: Wrapped module → number of its wrappers.
    """

    parameters: Mapping[str, str]
    depths: Mapping[str, int]

    def in_model(self, path: str) -> str:
        """Return the model's path of a module or parameter that may lie inside of wrappers.

        >>> WrappedParameters({}, {"mlp": 1}).in_model("mlp.base_layer.gate")
        'mlp.gate'
        """
        if _WRAPPED not in path:
            return path
        for at in _dots(path):
            inside = wrapped(path[:at], self.depths.get(path[:at], 0)) + "."
            if path[:at] in self.depths and path.startswith(inside):
                return f"{path[:at]}.{path.removeprefix(inside)}"
        return path


def wrapped_parameters(
    module_paths: Iterable[str],
    targets: Sequence[str],
    target_modules: Any,
    problems: Problems,
) -> WrappedParameters:
    """Find the parameter that each wrapper is for.

    A target without a module's name is a parameter of any module that has one of that name;
    that is taken to be so unless the module is targeted itself.

    Args:
        module_paths: Module paths as the adapter's keys have them.
        targets: ``target_parameters``.
        target_modules: ``target_modules``.
        problems: Takes what cannot be told.
    """
    depths: dict[str, dict[int, str]] = defaultdict(dict)
    for path in module_paths:
        module, depth = unwrapped(path)
        depths[module][depth] = path
    found: dict[str, str] = {}
    wrappers: dict[str, int] = {}
    so_far = WrappedParameters(found, wrappers)
    by_owner: dict[str, set[str]] = defaultdict(set)
    for target in targets:
        owner, _, leaf = target.rpartition(".")
        if owner and leaf:
            by_owner[owner].add(leaf)
    bare = {target for target in targets if "." not in target}
    targeted = _Targeted(target_modules)
    for keyed in sorted(depths, key=len):  # what is wrapped comes before what lies inside
        by_depth, module = depths[keyed], so_far.in_model(keyed)
        leaves: set[str] = set().union(*(by_owner.get(end, ()) for end in path_endings(module)))
        if len(leaves) < len(by_depth) or not leaves:
            if bare and module not in targeted:
                leaves |= bare
            if not leaves:
                continue
        ordered = in_definition_order(leaves)
        if ordered is None or set(by_depth) != set(range(len(leaves))):
            problems.add(
                module,
                f"{len(leaves)} pairs of matrices, for {', '.join(sorted(leaves))}",
                f"{len(by_depth)} at depths {sorted(by_depth)}",
                "the order of its parameters is not known; merge it with PEFT",
            )
            continue
        wrappers[module] = len(ordered)
        for depth, leaf in enumerate(reversed(ordered)):
            found[by_depth[depth]] = f"{module}.{leaf}"
    return so_far


def _dots(path: str) -> list[int]:
    return [at for at, letter in enumerate(path) if letter == "."]


def in_definition_order(leaves: Iterable[str]) -> list[str] | None:
    """Return parameter names in the order a model defines them, or ``None`` if unknown."""
    leaves = list(leaves)
    if len(leaves) == 1:
        return leaves
    if not set(leaves) <= set(_DEFINED):
        return None
    return sorted(leaves, key=_DEFINED.index)


class _Targeted:
    """The modules that ``target_modules``, a list of names or a pattern, names."""

    def __init__(self, target_modules: Any) -> None:
        self._pattern = target_modules if isinstance(target_modules, str) else None
        names = target_modules if isinstance(target_modules, list) else ()
        self._names = frozenset(map(str, names))

    def __contains__(self, module: str) -> bool:
        if self._pattern is None:
            return not self._names.isdisjoint(path_endings(module))
        try:
            return re.fullmatch(self._pattern, module) is not None
        except re.error:
            return False
