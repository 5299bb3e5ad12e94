"""``loraport train --dry-run``: the memory a run would take, and what would make it fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from loraport.base.config import read_model_config
from loraport.base.loading import model_without_weights, require_causal_lm
from loraport.errors import LoraportError
from loraport.free_memory import free_memory
from loraport.training.base.bitsandbytes_library import require_pageable
from loraport.training.base.frozen_base import checkpointable_layers
from loraport.training.data.text_data import row_length
from loraport.training.devices import Placement, choose_placement
from loraport.training.distributed.processes import Processes, processes_here, processes_now
from loraport.training.distributed.sharing import refuse_for_processes
from loraport.training.kernels.cuda_graphs import asked_to_record
from loraport.training.kernels.liger_kernels import liger_function
from loraport.training.lora.full_rank import above_full_rank
from loraport.training.losses.output_head import output_head
from loraport.training.memory.memory_plan import KeptMemory, kept_memory
from loraport.training.memory.step_memory import StepMemory, step_memory
from loraport.training.options import TrainOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Prediction:
    """Bytes that a run takes at its peak, on one device.

    Attributes:
        kept: What does not change from step to step.
        step: What a step takes beside it on a full batch of the longest rows allowed; the
            gradients are in it.
        recorded: What recorded passes keep beside what others take, which come in between.
    """

    kept: KeptMemory
    step: StepMemory
    recorded: int = 0

    @property
    def total(self) -> int:
        """All of it."""
        return self.kept.beside_steps + self.step.peak + self.recorded


@dataclass(frozen=True)
class DryRun:
    """What ``--dry-run`` found.

    Attributes:
        base: The base as it was named.
        device: Where the run would be.
        available: Bytes free there now.
        prediction: What the run would take.
        alternatives: Options to add or change → what the run would take then; only where it
            does not fit, and each takes less than the one before.
        processes: How many train together; all else is said of each of them.
        note: What the run would say of its ranks, if anything.
    """

    base: str
    device: str
    available: int
    prediction: Prediction
    alternatives: dict[str, Prediction]
    processes: int = 1
    note: str | None = None

    @property
    def fits(self) -> bool:
        """Whether there is enough memory."""
        return self.prediction.total <= self.available


def dry_run(base: str, options: TrainOptions) -> DryRun:
    """Predict a run's memory; no weight is read.

    Where ``torch.distributed`` is initialised, that of each of its processes: of the one that gets
    most rows of a batch.

    Args:
        base: See `loraport.base.finding.resolve_base`.
        options: How to train.

    Raises:
        LoraportError: If the base is none that is trained, its shapes cannot be told from its
            configuration, or training would refuse an option on the device.
    """
    from transformers import CONFIG_MAPPING

    directory = require_causal_lm(base)
    model = model_without_weights(directory)
    kind = read_model_config(directory).get("model_type")
    if model is None and kind not in CONFIG_MAPPING:
        raise LoraportError(
            f"--dry-run: {base}: expected a kind of model that transformers has, got {kind!r} as "
            "config.json's model_type; install a transformers that has it, or convert the base"
        )
    if model is None or output_head(model) is None:
        raise LoraportError(
            f"--dry-run: {base}: expected a language model that transformers makes from its "
            "configuration alone, got another; train a few steps instead (--steps 2)"
        )
    options = replace(options, max_length=row_length(directory, options.max_length))
    processes = processes_now()
    refuse_for_processes(options, processes)
    if options.loop.shard_base and processes.size > 1:
        raise LoraportError(
            "--dry-run: expected a base that every process has whole, got --shard-base, of which "
            "nothing is predicted; leave it out, or train a few steps instead (--steps 2)"
        )
    placement = choose_placement(options.loop.device, options.loop.dtype)
    asked_to_record(placement.device, options, processes.size)
    if options.liger_kernel:
        liger_function(str(model.config.model_type), placement.device)
    require_pageable(options.loop.optimizer, placement.device)
    available = available_memory(placement.device)
    if placement.device.type == "cpu" and processes.size > 1:
        available //= processes_here()  # a GPU has one of them
    note = above_full_rank(model, [options.lora])
    prediction = predict(model, directory, options, placement, processes)
    alternatives: dict[str, Prediction] = {}
    if prediction.total > available:
        least, flags = prediction.total, dict[tuple[str, ...], str]()
        for flag, changes in _savings(options, placement, model, processes):
            changed = replace(options, **changes)
            made = predict(model, directory, changed, placement, processes)
            if made.total < least:
                least, options = made.total, changed
                flags[tuple(changes)] = flag  # of two dtypes of the base, the later
                alternatives[" ".join(flags.values())] = made
    device = str(placement.device)
    return DryRun(base, device, available, prediction, alternatives, processes.size, note)


def predict(
    model: PreTrainedModel,
    directory: Path,
    options: TrainOptions,
    placement: Placement,
    processes: Processes,
) -> Prediction:
    """Predict what a run takes at its peak, in the process that gets most rows.

    Args:
        model: The base on the meta device; left so.
        directory: The base, for the dtype it is stored in.
        options: How to train.
        placement: Where, and in which precision.
        processes: They share each batch.

    Raises:
        LoraportError: If nothing can be adapted or the model cannot be traced.
    """
    dtype = _base_dtype(directory, options.base_dtype, placement)
    model.to(dtype)
    kept = kept_memory(
        model, options.lora, options.base_dtype, dtype, optimizer=options.loop.optimizer
    )
    rows = -(-options.batch_size // processes.size)
    step = step_memory(model, replace(options, batch_size=rows), placement)
    if processes.size > 1:  # when gradients are summed, they are there twice
        step = replace(step, peak=max(step.peak, 2 * kept.gradients))
    return Prediction(kept, step, step.peak if options.cuda_graphs else 0)


def available_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device now; see `loraport.free_memory`."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = free_memory()
    if found is not None:
        return found
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _base_dtype(directory: Path, storage: str, placement: Placement) -> torch.dtype:
    """Return what unquantized weights are kept in, as `frozen_base` loads and narrows them."""
    config = read_model_config(directory)
    stored = config.get("dtype") or config.get("torch_dtype")
    narrow = storage == "bfloat16" or (
        placement.dtype is torch.bfloat16
        and (storage in ("nf4", "int8") or (storage == "auto" and stored == "bfloat16"))
    )
    return torch.bfloat16 if narrow else torch.float32


def _savings(
    options: TrainOptions, placement: Placement, model: PreTrainedModel, processes: Processes
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield flags that may save memory, each with the options it changes, the gentlest first.

    Appended to a command, they replace what it has of them.

    Args:
        options: How to train.
        placement: Where.
        model: The base.
        processes: They share each batch.
    """
    if options.cuda_graphs:
        yield "--no-cuda-graphs", {"cuda_graphs": False}
    if not options.gradient_checkpointing:
        if model.supports_gradient_checkpointing:
            yield "--gradient-checkpointing", {"gradient_checkpointing": True}
    elif options.checkpointed_layers is not None:
        layers = len(checkpointable_layers(model))
        yield f"--checkpointed-layers {layers}", {"checkpointed_layers": layers}
    size = options.batch_size
    fewer = next(count for count in range(processes.size, size + 1) if size % count == 0)
    if fewer < size:
        accumulate = options.loop.accumulate * (size // fewer)
        loop = replace(options.loop, accumulate=accumulate)
        flags = f"--batch-size {fewer} --accumulate {accumulate}"
        yield flags, {"batch_size": fewer, "loop": loop}
    if options.base_dtype in ("auto", "float32") and placement.dtype is torch.float32:
        yield "--base-dtype bfloat16", {"base_dtype": "bfloat16"}
    if options.base_dtype != "nf4":
        yield "--base-dtype nf4", {"base_dtype": "nf4"}
    if options.max_length > 256:
        shorter = options.max_length // 2
        yield f"--max-length {shorter}", {"max_length": shorter}
