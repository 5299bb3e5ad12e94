"""What one step takes at its peak: a real forward and backward pass, on tensors without numbers."""

from __future__ import annotations

import contextlib
import copy
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from loraport.errors import LoraportError
from loraport.training.base.frozen_base import (
    QUANTIZED,
    checkpoint_activations,
    checkpointable_layers,
)
from loraport.training.data.batches import TokenBatch
from loraport.training.data.end_to_end import SegmentedBatch
from loraport.training.data.model_inputs import Shortcuts, assume_shortcuts, attention_window
from loraport.training.devices import Placement
from loraport.training.kernels.fused_norms import fused_norms
from loraport.training.lora.inject import attach, lora_layers
from loraport.training.lora.rounded import RoundedMatrices
from loraport.training.losses.chunked_loss import LogitTransform
from loraport.training.losses.language_model import cross_entropy_at
from loraport.training.losses.output_head import assume_transform
from loraport.training.memory.grouped_products import GroupedProducts
from loraport.training.memory.live_bytes import LiveBytes
from loraport.training.memory.quantized_shape import without_numbers
from loraport.training.memory.repeated_layers import Piece, Units, find_units
from loraport.training.options import TrainOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNMASKED = "loraport-unmasked"


@dataclass(frozen=True)
class StepMemory:
    """Bytes that a step takes beside base, adapter and optimizer.

    Attributes:
        activations: Kept between the forward and the backward pass of one batch.
        peak: The most at once: activations, gradients, temporary tensors, and the random states
            that checkpointed layers keep on a CPU.
    """

    activations: int
    peak: int


def step_memory(model: PreTrainedModel, options: TrainOptions, placement: Placement) -> StepMemory:
    """Trace a step on a full batch of the longest rows allowed.

    The very code that trains runs on fake tensors, which have shapes and storages and nothing in
    them, and `LiveBytes` counts. What kernels take within one operation (a GPU's workspace) is not
    in it, nor what an allocator keeps for later.

    Args:
        model: The base on the meta device, in its dtype, without LoRA layers; left as it is.
        options: How to train.
        placement: Where, and in which precision.

    Raises:
        LoraportError: If the model does not support checkpointing, or cannot be traced.
    """
    prepared = _prepared(model, options, placement.dtype)
    states = _random_states(prepared, options, placement)
    units: Units | None = None
    with contextlib.suppress(Exception):  # whatever is the matter, every layer is traced then
        units = find_units(prepared)
        if units is not None:
            kept, peak = _traced(prepared, options, placement, units)
            return StepMemory(kept, peak + states)
    if units is not None:
        prepared = _prepared(model, options, placement.dtype)
    try:
        kept, peak = _traced(prepared, options, placement, None)
    except Exception as error:
        first = (str(error).splitlines() or [""])[0]
        raise LoraportError(
            f"--dry-run: {type(model).__name__} cannot be traced without its weights "
            f"({type(error).__name__}: {first}); train a few steps instead (--steps 2)"
        ) from error
    return StepMemory(kept, peak + states)


def _traced(
    model: PreTrainedModel, options: TrainOptions, placement: Placement, units: Units | None
) -> tuple[int, int]:
    """Return the bytes alive between the passes of a batch, and at the peak.

    Args:
        model: As `_prepared` returns it; spent afterwards.
        options: How to train.
        placement: Where, and in which precision.
        units: Layers that repeat, of which only some are traced; ``None`` to trace all.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    device, layers = placement.device, lora_layers(model).values()
    pieces: list[Piece] = []
    between = set[int]()
    with (
        _one_error_is_enough(),
        fused_norms(model, device),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        if units is not None:
            units.take_out(device)
        model.to_empty(device=device)
        with GroupedProducts(), LiveBytes() as live:
            rounded = RoundedMatrices(layers, placement.dtype)
            begin = 0
            # From the second batch of a step on, there are gradients already.
            for _ in range(min(options.loop.accumulate, 2)):
                batch = _full_batch(options, device)
                count = batch.tokens.shape[0] * (options.max_length - 1)
                places = torch.arange(count, device=device)
                with rounded.provided():
                    watched = contextlib.nullcontext() if units is None else units.watch(live)
                    with watched, placement.autocast():
                        loss = cross_entropy_at(model, batch, places, torch.zeros_like(places))
                    turn = len(live.changes)
                    loss.backward()  # type: ignore[no-untyped-call]
                    if units is not None:
                        units.give_gradients(live)
                end = len(live.changes)
                between.add(turn)
                pieces += [(begin, turn, 1), (turn, end, 1)]
                if units is not None:
                    pieces[-2:] = units.pieces(live.changes, begin, turn)
                begin = end
    kept = now = peak = 0
    for start, end, times in pieces:
        for change in live.changes[start:end] * times:
            now += change
            peak = max(peak, now)
        if end in between:
            kept = max(kept, now)
    return kept, peak


def _random_states(model: PreTrainedModel, options: TrainOptions, placement: Placement) -> int:
    """Return the bytes of the states that checkpointed layers keep, to drop out the same again.

    Of the CPU's generator, one a layer and one more while a layer is computed again; a GPU's
    memory holds none.
    """
    if not options.gradient_checkpointing or placement.device.type != "cpu":
        return 0
    every = len(checkpointable_layers(model))
    return ((options.checkpointed_layers or every) + 1) * torch.get_rng_state().nbytes


def _prepared(model: PreTrainedModel, options: TrainOptions, dtype: torch.dtype) -> PreTrainedModel:
    """Return a copy as `text` would train it, with what is measured on real models assumed."""
    model = copy.deepcopy(model)  # of shapes alone
    if options.base_dtype in QUANTIZED:
        without_numbers(model, options.base_dtype, dtype)
    lora = options.lora
    layers = attach(model, replace(lora, init="kaiming"))  # there are no weights to begin from
    if lora.init in ("pissa", "olora"):
        for layer in layers.values():
            layer.initial_A = torch.empty_like(layer.lora_A, requires_grad=False)
            layer.initial_B = torch.empty_like(layer.lora_B, requires_grad=False)
    if options.gradient_checkpointing:
        # Random states have numbers: nothing is drawn here that must be drawn alike again.
        checkpoint_activations(model, options.checkpointed_layers, keep_random_state=False)
    window = attention_window(model)
    if model.config._attn_implementation == "sdpa" and options.max_length <= window:
        _without_mask(model)
    assume_shortcuts(model, Shortcuts(padding_unseen=True, rows_apart=True, longest=window))
    assume_transform(model, _configured_transform(model))
    return model.train()


@contextlib.contextmanager
def _one_error_is_enough() -> Iterator[None]:
    """Keep torch from logging a traceback of what is raised anyway."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    logger.disabled = True
    try:
        yield
    finally:
        logger.disabled = False


def _without_mask(model: PreTrainedModel) -> None:
    """Let attention be causal without a mask, as it is for rows of one length.

    transformers makes one for fake tensors, whose padding it cannot look at; it makes none for an
    attention that it knows no mask of.
    """
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_UNMASKED, sdpa_attention_forward)
    model.set_attn_implementation(_UNMASKED)


def _full_batch(options: TrainOptions, device: torch.device) -> TokenBatch:
    """Return the largest batch: rows of the greatest length, or sequences filled with two."""
    shape = (options.batch_size, options.max_length)
    tokens, labels = (torch.zeros(shape, dtype=torch.int64, device=device) for _ in range(2))
    if options.packing != "fill":
        return TokenBatch(tokens, None, labels)
    positions, segments = torch.zeros_like(tokens), torch.zeros_like(tokens)
    return SegmentedBatch(tokens, None, labels, positions=positions, segments=segments)


def _configured_transform(model: PreTrainedModel) -> LogitTransform:
    """Return what becomes of logits, as the configuration names it: each kind takes copies."""
    settings: Any = model.config.get_text_config()
    scale = getattr(settings, "logit_scale", None) or getattr(settings, "logits_scaling", None)
    softcap = getattr(settings, "final_logit_softcapping", None)
    return LogitTransform(float(scale or 1.0), softcap)
