"""A weighted sum of adapters as one adapter."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from converters.low_rank import refactor, require_kept
from loraport.adapter import Adapter, LoraModule, ModuleKind, require_adapter
from loraport.errors import LoraportError, Problems
from loraport.fingerprint import BaseFingerprint
from loraport.option_checks import is_finite, shown

if TYPE_CHECKING:
    import torch

_ROUNDING = 2.0**-22  # of a sum of numbers rounded to float32 once, with two bits to spare


@dataclass(frozen=True)
class Composed:
    """A weighted sum of adapters.

    Attributes:
        adapter: The sum.
        errors: Module → relative error of its update; empty where the sum is exact.
    """

    adapter: Adapter
    errors: Mapping[str, float]


def compose(
    weighted: Sequence[tuple[str, Adapter, float]],
    rank: int | None = None,
    energy: float | None = None,
) -> Composed:
    """Add adapters up.

    Without ``rank`` and ``energy`` ranks are concatenated, ``A = [A_1; A_2]``,
    ``B = [s_1 c_1 B_1, s_2 c_2 B_2]``: no cross terms, exact but for one rounding of B to
    float32. With either the sum is truncated to its largest singular values; one that is zero but
    for rounding becomes zero, of which every truncation is exact.

    Args:
        weighted: Name, adapter and strength of each.
        rank: Rank of the result.
        energy: Or share of the sum's energy to keep, by module.

    Raises:
        LoraportError: For what does not add up: DoRA, replaced parameters, fused experts,
            modules that differ in shape, adapters of different bases, sums beyond float32; for
            what is no adapter, number of ranks or share of the energy.
    """
    require_kept(rank, energy)
    weighted = _listed(weighted)
    problems = Problems()
    if not weighted:
        problems.add("adapters", "at least one", "none")
    for name, adapter, strength in weighted:
        require_adapter(adapter, name)
        if not is_finite(strength):
            problems.add(f"strength of {name}", "a finite number", shown(strength))
    problems.raise_if_any("the adapters do not add up to one")
    _check(weighted, problems)
    paths = list(dict.fromkeys(path for _, adapter, _ in weighted for path in adapter.modules))
    modules, errors = {}, {}
    for path in paths:
        parts = [
            (adapter.modules[path], strength)
            for _, adapter, strength in weighted
            if path in adapter.modules
        ]
        try:
            total = _concatenated(parts)
            if rank is not None or energy is not None:
                total, errors[path] = _reduced(total, rank, energy)
            modules[path] = total
        except LoraportError as error:
            problems.add(path, "updates that add up", str(error))
    problems.raise_if_any("the adapters do not add up to one")
    first = weighted[0][1]
    bases = {adapter.base_model for _, adapter, _ in weighted}
    return Composed(
        Adapter(
            modules=modules,
            base_model=first.base_model if len(bases) == 1 else None,
            base_fingerprint=_joint_fingerprint(weighted),
            training={
                k: v for k, v in first.training.items() if k in ("task_type", "peft_version")
            },
        ),
        errors,
    )


def _listed(weighted: Any) -> Sequence[tuple[str, Adapter, float]]:
    """Return what was given as a list of three values each."""
    listed = list(weighted) if isinstance(weighted, Iterable) else [weighted]
    for each in listed:
        if not isinstance(each, tuple | list) or len(each) != 3:
            got = type(each).__name__ if isinstance(each, Adapter) else repr(each)
            raise LoraportError(
                f"adapters: expected a name, an adapter and a strength of each, got {got}"
            )
    return listed


def _check(weighted: Sequence[tuple[str, Adapter, float]], problems: Problems) -> None:
    remedy = "merge the adapters into the base instead: that is exact for every variant"
    for name, adapter, _ in weighted:
        for parameter, replacement in adapter.replacements.items():
            if replacement.rows is not None:
                got, more = "trained token rows", ""
            else:
                got, more = "a replaced parameter", " (--base leaves out copies of the base's own)"
            problems.add(f"{name}: {parameter}", "low-rank updates", got, f"{remedy}{more}")
        for path, module in adapter.modules.items():
            if module.magnitude is not None:
                problems.add(f"{name}: {path}", "a plain update", "DoRA, which has a gain", remedy)
            if module.kind is ModuleKind.EXPERTS:
                problems.add(f"{name}: {path}", "one matrix", "fused experts", remedy)


def _concatenated(parts: Sequence[tuple[LoraModule, float]]) -> LoraModule:
    import torch

    first = parts[0][0]
    for module, _ in parts[1:]:
        if _form(module) != _form(first):
            raise LoraportError(f"{_form(first)} and {_form(module)}")
    scaled = [(module.lora_B.double() * (module.scaling * s)).float() for module, s in parts]
    biases = [
        module.lora_B_bias.double() * (module.scaling * strength)
        for module, strength in parts
        if module.lora_B_bias is not None
    ]
    if not all(tensor.float().isfinite().all() for tensor in (*scaled, *biases)):
        raise LoraportError("numbers beyond what float32 holds; use smaller weights")
    rank = sum(module.rank for module, _ in parts)
    # Each group of B reads rows of A of its own, so those of one group lie together.
    shape = (first.groups, -1, *first.lora_A.shape[1:])
    grouped = [module.lora_A.float().reshape(shape) for module, _ in parts]
    return replace(
        first,
        lora_A=torch.cat(grouped, dim=1).flatten(0, 1),
        lora_B=torch.cat(scaled, dim=1),
        lora_B_bias=torch.stack(biases).sum(0).float() if biases else None,
        alpha=float(rank),  # scaling 1
        use_rslora=False,
    )


def _form(module: LoraModule) -> tuple[object, ...]:
    return (
        module.kind.value,
        tuple(module.lora_A.shape[1:]),
        module.lora_B.shape[0],
        module.groups,
    )


def _reduced(
    module: LoraModule, rank: int | None, energy: float | None
) -> tuple[LoraModule, float]:
    import torch

    if module.groups > 1:
        raise LoraportError(
            "a convolution with groups, whose rank cannot be reduced; leave out --rank and "
            "--energy: the sum is then exact"
        )
    a, b = module.lora_A.flatten(1), module.lora_B.flatten(1)
    factors = refactor(torch.zeros_like(b) if _cancels(b, a) else b, a, rank, energy)
    reduced = replace(
        module,
        lora_A=factors.a.reshape(-1, *module.lora_A.shape[1:]),
        lora_B=factors.b.reshape(factors.b.shape[0], -1, *module.lora_B.shape[2:]),
        alpha=float(factors.rank),
    )
    return reduced, factors.error


def _cancels(b: torch.Tensor, a: torch.Tensor) -> bool:
    """Tell whether ``b @ a`` is nothing but what rounding ``b`` to float32 leaves of its terms."""
    # Products of the rank-one terms with each other: all of them make the sum's squared norm.
    products = (b.double().T @ b.double()) * (a.double() @ a.double().T)
    return bool(products.sum() <= products.trace() * _ROUNDING**2)


def _joint_fingerprint(
    weighted: Sequence[tuple[str, Adapter, float]],
) -> BaseFingerprint | None:
    """Return what all say about the base together.

    Raises:
        LoraportError: If two contradict each other.
    """
    joint: dict[str, str] = {}
    first = ""
    for name, adapter, _ in weighted:
        mine = adapter.base_fingerprint
        if mine is None:
            continue
        mine.require_same_base(BaseFingerprint(joint), name, first)
        joint.update(mine.modules)
        first = first or name
    return BaseFingerprint(joint) if joint else None
