"""``loraport train --dry-run``: the memory a run would take, and what would make it fit."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from loraport.base_model import model_without_weights, read_model_config, resolve_base
from loraport.errors import LoraportError
from loraport.training.data.text_data import row_length
from loraport.training.devices import Placement, choose_placement
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
            does not fit.
    """

    base: str
    device: str
    available: int
    prediction: Prediction
    alternatives: dict[str, Prediction]

    @property
    def fits(self) -> bool:
        """Whether there is enough memory."""
        return self.prediction.total <= self.available


def dry_run(base: str, options: TrainOptions) -> DryRun:
    """Predict a run's memory; no weight is read.

    Args:
        base: See `loraport.base_model.resolve_base`.
        options: How to train.

    Raises:
        LoraportError: If the base's shapes cannot be told from its configuration.
    """
    directory = resolve_base(base)
    model = model_without_weights(directory)
    if model is None or output_head(model) is None:
        raise LoraportError(
            f"--dry-run: {base}: expected a language model that transformers makes from its "
            "configuration alone, got another; train a few steps instead (--steps 2)"
        )
    options = replace(options, max_length=row_length(directory, options.max_length))
    placement = choose_placement(options.loop.device, options.loop.dtype)
    available = available_memory(placement.device)
    prediction = predict(model, directory, options, placement)
    alternatives = {}
    if prediction.total > available:
        for flags, changed in _lighter(options, placement):
            alternatives[flags] = predict(model, directory, changed, placement)
    return DryRun(base, str(placement.device), available, prediction, alternatives)


def predict(
    model: PreTrainedModel, directory: Path, options: TrainOptions, placement: Placement
) -> Prediction:
    """Predict what a run takes at its peak.

    Args:
        model: The base on the meta device; left so.
        directory: The base, for the dtype it is stored in.
        options: How to train.
        placement: Where, and in which precision.

    Raises:
        LoraportError: If nothing can be adapted or the model cannot be traced.
    """
    dtype = _base_dtype(directory, options.base_dtype, placement)
    model.to(dtype)
    kept = kept_memory(
        model, options.lora, options.base_dtype, dtype, optimizer=options.loop.optimizer
    )
    step = step_memory(model, options, placement)
    return Prediction(kept, step, step.peak if options.cuda_graphs else 0)


def available_memory(device: torch.device) -> int:
    """Return the bytes that are free on a device now; of the host, without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # not Linux
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


def _lighter(options: TrainOptions, placement: Placement) -> Iterator[tuple[str, TrainOptions]]:
    """Yield what takes less memory, one change after the other, the gentlest first."""
    flags: list[str] = []
    if options.cuda_graphs:
        options = replace(options, cuda_graphs=False)
        flags.append("--no-cuda-graphs")
        yield " ".join(flags), options
    if not options.gradient_checkpointing:
        options = replace(options, gradient_checkpointing=True)
        flags.append("--gradient-checkpointing")
        yield " ".join(flags), options
    if options.batch_size > 1:
        accumulate = options.loop.accumulate * options.batch_size
        loop = replace(options.loop, accumulate=accumulate)
        options = replace(options, batch_size=1, loop=loop)
        flags.append(f"--batch-size 1 --accumulate {accumulate}")
        yield " ".join(flags), options
    narrower: tuple[Literal["bfloat16", "nf4"], ...] = ("bfloat16", "nf4")
    if options.base_dtype in ("auto", "float32") and placement.dtype is torch.float32:
        yield " ".join([*flags, "--base-dtype bfloat16"]), replace(options, base_dtype=narrower[0])
    if options.base_dtype != "nf4":
        options = replace(options, base_dtype=narrower[1])
        flags.append("--base-dtype nf4")
        yield " ".join(flags), options
    if options.max_length > 256:
        shorter = options.max_length // 2
        flags.append(f"--max-length {shorter}")
        yield " ".join(flags), replace(options, max_length=shorter)
