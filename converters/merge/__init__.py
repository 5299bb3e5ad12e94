"""Merge adapters into a checkpoint of any size: streamed, exact, in one pass.

``planning`` decides what becomes of every tensor; ``writer`` streams it; ``arithmetic`` is what
happens to a block of rows.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

from converters.merge.base import BaseCheckpoint
from converters.merge.changes import touched_parameters
from converters.merge.inputs import read_adapters
from converters.merge.layout import BaseLayout, base_layout
from converters.merge.model_files import write_model_files
from converters.merge.opening import open_base
from converters.merge.options import MergeOptions
from converters.merge.plan import MergePlan, TensorPlan
from converters.merge.planning import plan_merge
from converters.merge.same_base import require_same_base
from converters.merge.targets import NamedAdapter
from converters.merge.writer import write_shards
from loraport.errors import LoraportError
from loraport.output import new_directory, refuse_existing

__all__ = ["MergeOptions", "MergePlan", "TensorPlan", "make_plan", "merge"]


def make_plan(options: MergeOptions) -> MergePlan:
    """Read everything but the weights, and decide what becomes of every tensor.

    Raises:
        LoraportError: If anything cannot be read, does not fit, or cannot be merged exactly.
    """
    if not options.adapters:
        raise LoraportError("merge: expected at least one adapter, got none")
    if options.output is not None:
        refuse_existing(options.output, force=options.force)
    adapters = read_adapters(options)
    base = open_base(options.base)
    layout = _layout(base, adapters)
    plan = plan_merge(base, layout, adapters)
    if not options.ignore_fingerprint:
        require_same_base(base, layout, adapters)
    return plan


def merge(options: MergeOptions, plan: MergePlan, progress: Callable[[int], None]) -> None:
    """Write a planned merge; the output appears whole or not at all.

    Args:
        options: What the plan was made from, with an output.
        plan: From `make_plan`.
        progress: Told the bytes written, as they are.

    Raises:
        LoraportError: If the output exists or there is no room for it.
        OSError: If the disk fills up or a file cannot be read.
    """
    assert options.output is not None
    output = options.output.absolute()
    adapters = (path for path, _ in options.adapters)
    inputs = (options.base, plan.base.directory, *adapters, options.initial_adapter)
    refuse_existing(output, force=options.force, inputs=inputs)
    _require_room(output, plan.nbytes)
    with new_directory(output, force=options.force) as partial:
        write_shards(plan, partial, progress, options.threads)
        write_model_files(plan, partial)


def _layout(base: BaseCheckpoint, adapters: list[NamedAdapter]) -> BaseLayout:
    shapes = {name: source.shape for name, source in base.sources().items()}
    tasks = sorted({str(each.adapter.training.get("task_type") or "") for each in adapters} - {""})
    if len(tasks) > 1:
        raise LoraportError(f"the adapters are for different tasks: {', '.join(tasks)}")
    directory = base.directory if base.config else None
    layout = base_layout(directory, shapes)
    if not tasks or _names_all(layout, adapters):
        return layout
    # The adapter brings parameters that the base's own class has none of: its task's head.
    return base_layout(directory, shapes, tasks[0])


def _names_all(layout: BaseLayout, adapters: list[NamedAdapter]) -> bool:
    """Tell whether every parameter that the adapters name is one of the base's own model."""
    index = layout.index()
    return all(
        index.candidates(asked) or layout.place(asked)
        for each in adapters
        for asked in touched_parameters(each.adapter.modules, each.adapter.replacements)
    )


def _require_room(output: Path, nbytes: int) -> None:
    place = output.parent
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < nbytes:
        raise LoraportError(
            f"{output}: expected {nbytes:,} bytes of room for the merged model, "
            f"got {free:,} free on {place}; free some, or choose another disk"
        )
