"""Decide what a merge does to each tensor."""

from __future__ import annotations

from collections.abc import Sequence

from converters.merge.base import BaseCheckpoint
from converters.merge.builder import PlanBuilder
from converters.merge.config_changes import config_after
from converters.merge.layout import BaseLayout
from converters.merge.plan import MergePlan
from converters.merge.targets import NamedAdapter, resolve, settle_ties
from loraport.errors import Problems, first_names

_DEQUANTIZED = "the output is its dequantized weights, merged, as a float checkpoint"

_NAMED = 3  # of what the base lacks


def plan_merge(
    base: BaseCheckpoint, layout: BaseLayout, adapters: Sequence[NamedAdapter]
) -> MergePlan:
    """Decide what becomes of every tensor.

    Raises:
        LoraportError: Everything that has no place in the base or cannot be merged exactly.
    """
    problems = Problems()
    said = resolve(adapters, layout, problems)
    ties = settle_ties(said, layout)
    builder = PlanBuilder(base, layout, problems)
    builder.untie(ties)
    for parameter, entries in said.items():
        builder.change(parameter, entries, ties)
    builder.check_orientations()
    builder.count(adapters)
    config = config_after(
        base.config,
        layout,
        untied=builder.untied,
        resized=builder.resized,
        dequantized=base.quantized is not None,
        problems=problems,
    )
    problems.raise_if_any("the merge cannot be exact")
    lacking = [name for name in layout.missing if name not in builder.sources]
    if lacking and base.quantized is None:
        builder.notes.append(_lacking(lacking))
    if base.quantized is not None:
        builder.notes.insert(0, f"the base was quantized ({base.quantized}); {_DEQUANTIZED}")
    return MergePlan(base, builder.shards(), config, tuple(builder.notes))


def _lacking(names: Sequence[str]) -> str:
    return (
        f"the base's files lack {first_names(names, _NAMED)}, and so does the output: "
        "transformers draws them at random"
    )
