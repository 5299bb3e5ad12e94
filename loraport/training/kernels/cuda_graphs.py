"""Recorded passes: a model's forward and backward pass once for each shape of batch, on a GPU.

A step of a small model is thousands of small operations, and a GPU waits for the host to name each.
A CUDA graph names them all at once. What is recorded is the model up to its output head; the loss,
whose shapes depend on how many tokens are learned, stays as it is. A recording is for one shape, so
batches come in few lengths (`loraport.training.data.packing.in_few_lengths`); a shape that is seen
for the first time runs as ever, at the second time it is recorded.

What cannot be recorded is refused where ``--cuda-graphs`` asks for it. Where nothing is asked,
passes are recorded if that can be told to work: a recording that fails leaves the GPU's random
numbers and memory in a state in which nothing more can be computed.

Source: CUDA programming guide, "CUDA Graphs"; PyTorch notes on CUDA semantics, "CUDA Graphs".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

import torch
from torch import nn

from loraport.errors import LoraportError, first_line
from loraport.training import rng
from loraport.training.base.frozen_base import QUANTIZED
from loraport.training.data.batches import TokenBatch
from loraport.training.data.end_to_end import SegmentedBatch
from loraport.training.data.packing import why_not_few_lengths
from loraport.training.kernels.recorder import Recorder, on_gpu
from loraport.training.lora.inject import lora_layers
from loraport.training.lora.rounded import Matrices
from loraport.training.losses.language_model import hidden_before
from loraport.training.losses.output_head import logit_transform, output_head
from loraport.training.options import TrainOptions


class Trained(NamedTuple):
    """What a model's passes give gradients.

    Attributes:
        parameters: Leaves, the same ones as long as passes are recorded.
        matrices: Those of them that may be multiplied as rounded copies.
    """

    parameters: Sequence[torch.Tensor]
    matrices: Sequence[Matrices]


NOT_RECORDED = "passes are not recorded (CUDA graphs):"
_MOST = 64  # recordings: each keeps its output, and what CUDA needs to know of it


def asked_to_record(device: torch.device, options: TrainOptions, processes: int = 1) -> bool:
    """Tell whether passes are to be recorded, as far as that does not depend on the model.

    Args:
        device: Where it computes.
        options: How it trains.
        processes: How many train together.

    Raises:
        LoraportError: If they have to be and the device is no GPU, activations are computed again
            (which asks for the state of the random numbers), or layers are compiled.
    """
    others = {
        "--gradient-checkpointing": options.gradient_checkpointing,
        "--compile": options.compile,
    }
    present = [flag for flag, given in others.items() if given]
    if options.cuda_graphs is None:
        alone = processes == 1 and options.base_dtype not in QUANTIZED
        return device.type == "cuda" and alone and not present
    if not options.cuda_graphs:
        return False
    if device.type != "cuda":
        raise LoraportError(
            f"--cuda-graphs: expected a CUDA GPU, got {device}; leave out --cuda-graphs"
        )
    for flag in present:
        raise LoraportError(f"--cuda-graphs: expected no {flag} beside it; leave out one of them")
    return True


def why_not_recorded(model: nn.Module, longest: int) -> str | None:
    """Return why a model's passes cannot be recorded, as far as it shows without a recording.

    Args:
        model: A transformers causal language model on its device.
        longest: Tokens of a row at most.
    """
    head = output_head(model)
    if head is None or logit_transform(model, head) is None:
        return f"expected a model whose output head can be told apart, got {type(model).__name__}"
    return why_not_few_lengths(model, longest)


class RecordedPasses:
    """Gives `language_model_loss` the hidden states of a model that trains on one GPU.

    Training runs in the context `stream`: autograd remembers on which stream it first met a
    matrix, and waits for that one when the matrix gets its gradient, which while another stream is
    recorded is an error.

    Args:
        model: A transformers causal language model with LoRA layers, in training mode when called.
        record: See `Recorder`; CUDA's where ``None``.
        trained: What gets gradients; the model's parameters and LoRA layers where ``None``.
        tentative: Record only where that can be told to work beforehand and memory is left;
            what is not recorded runs as ever.
        note: Told once why passes are not recorded, or no more of them.

    Raises:
        LoraportError: If the model's output head cannot be told apart.
    """

    def __init__(
        self,
        model: nn.Module,
        record: Recorder | None = None,
        *,
        trained: Trained | None = None,
        tentative: bool = False,
        note: Callable[[str], None] = lambda text: None,  # noqa: ARG005
    ) -> None:
        head = output_head(model)
        if head is None or logit_transform(model, head) is None:
            raise LoraportError(
                f"--cuda-graphs: expected a model whose output head can be told apart, got "
                f"{type(model).__name__}; use --no-cuda-graphs"
            )
        self._model, self._trained = model, trained or trained_in(model)
        self._record = record or on_gpu(model)
        self._untried, self._tentative, self._off = tentative, tentative, False
        self._note, self._full = note, False
        self._passes: dict[Hashable, _Pass | None] = {}
        self._gradients: dict[torch.Tensor, torch.Tensor] = {}

    @property
    def recorded(self) -> int:
        """How many shapes of batches are recorded."""
        return sum(made is not None for made in self._passes.values())

    def stream(self) -> contextlib.AbstractContextManager[None]:
        """Return the context to train in."""
        return self._record.stream()

    def __call__(self, model: nn.Module, head: nn.Module, batch: TokenBatch) -> torch.Tensor:
        """Return what the model gives its head, ``[batch, length, dim]``.

        Raises:
            LoraportError: If the model does what cannot be recorded.
        """
        # For other batches transformers makes masks, and other ones while something is recorded.
        recordable = torch.is_grad_enabled() and isinstance(batch, SegmentedBatch)
        if not recordable or self._off or model is not self._model:
            return hidden_before(model, head, batch)
        # Another run has rounded copies of its own; those of recordings live as long as these.
        rounded = next((each.rounded for each in self._trained.matrices if each.rounded), None)
        copies = None if rounded is None else id(rounded[0])
        key = (copies, *((name, tensor.shape) for name, tensor in _given(batch).items()))
        if key not in self._passes:
            if len(self._passes) < _MOST:
                self._passes[key] = None
            return hidden_before(model, head, batch)
        made = self._passes[key]
        if made is None:
            if self._tentative and not self._may_record(head, batch):
                return hidden_before(model, head, batch)
            made = _Pass(model, head, batch, self._record, self._trained, self._gradients)
            self._passes[key] = made
        hidden: torch.Tensor = _Replayed.apply(made.leaves[0], made, batch)  # type: ignore[no-untyped-call]
        return hidden

    def _may_record(self, head: nn.Module, batch: TokenBatch) -> bool:
        """Tell whether a recording will work; whether the model's passes can be is tried once."""
        if self._untried:
            self._untried = False
            before = rng.capture()
            leaves = _leaves(self._trained)

            def run() -> None:
                hidden = hidden_before(self._model, head, batch)
                slope = torch.zeros_like(hidden)
                with torch.autocast(hidden.device.type, enabled=False):
                    torch.autograd.grad(hidden, leaves, slope, allow_unused=True)

            self._off = not self._record.runs_ahead(run)
            rng.restore(before)
            if self._off:
                self._note(
                    f"{NOT_RECORDED} a pass of {type(self._model).__name__} waits for the GPU"
                )
        if self._off:
            return False
        room = self._record.has_room()
        if not room and not self._full:
            self._full = True
            self._note(
                f"passes of {self.recorded} shapes of batches are recorded (CUDA graphs), the GPU "
                "has no memory left for one more"
            )
        return room


def trained_in(model: nn.Module) -> Trained:
    """Return what gets gradients in a model with LoRA layers."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return Trained(parameters, list(lora_layers(model).values()))


def _leaves(trained: Trained) -> list[torch.Tensor]:
    rounded = [matrix for each in trained.matrices for matrix in each.rounded or ()]
    return [*trained.parameters, *rounded]


class _Pass:
    """One recording.

    Attributes:
        leaves: The tensors that get gradients: trained matrices, and their rounded copies.
    """

    def __init__(
        self,
        model: nn.Module,
        head: nn.Module,
        batch: TokenBatch,
        record: Recorder,
        trained: Trained,
        gradients: dict[torch.Tensor, torch.Tensor],
    ) -> None:
        self.leaves = _leaves(trained)
        # The gradients of rounded copies, by `RoundedMatrices`.
        self._taken_at_once = set(self.leaves[len(trained.parameters) :])
        self._model, self._head = model, head
        self._gradients = gradients  # of all recordings: one is read before another is replayed
        self._taken: list[torch.Tensor] = []
        self._held: list[torch.Tensor] = []
        copies: dict[str, Any] = {name: each.clone() for name, each in _given(batch).items()}
        self._batch = replace(batch, **copies)
        device = batch.tokens.device.type
        dtype, on = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        try:
            with torch.autocast(device, dtype=dtype, enabled=on, cache_enabled=False):
                self._replay_forward = record(self._forward)
            self._slope = torch.zeros_like(self._hidden)
            with torch.autocast(device, enabled=False):
                self._replay_backward = record(self._backward)
        except RuntimeError as error:
            cause = error.__context__ or error  # the end of a failed recording fails, too
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            reason = first_line(cause)
            raise LoraportError(
                f"--cuda-graphs: a pass of {type(model).__name__} cannot be recorded: {reason}; "
                "use --no-cuda-graphs"
            ) from error

    def _forward(self) -> None:
        self._hidden = hidden_before(self._model, self._head, self._batch)

    def _backward(self) -> None:
        found = torch.autograd.grad(self._hidden, self.leaves, self._slope, allow_unused=True)
        self._hidden = self._hidden.detach()
        there = {leaf: g for leaf, g in zip(self.leaves, found, strict=True) if g is not None}
        for leaf in there:
            if leaf not in self._gradients:
                self._gradients[leaf] = torch.empty_like(leaf)
        self._taken = [leaf for leaf in there if leaf in self._taken_at_once]
        self._held = [leaf for leaf in there if leaf not in self._taken_at_once]
        torch._foreach_copy_([self._gradients[leaf] for leaf in there], list(there.values()))

    def forward(self, batch: TokenBatch) -> torch.Tensor:
        for name, tensor in _given(self._batch).items():
            tensor.copy_(getattr(batch, name))
        self._replay_forward()
        return self._hidden.detach()

    def backward(self, slope: torch.Tensor) -> None:
        self._slope.copy_(slope)
        self._replay_backward()
        for leaf in self._taken:
            leaf.grad = self._gradients[leaf]
        if not self._held:
            return
        # Copies: the next replay writes where these were.
        made = torch._foreach_mul([self._gradients[leaf] for leaf in self._held], 1.0)
        for leaf, gradient in zip(self._held, made, strict=True):
            leaf.grad = gradient if leaf.grad is None else leaf.grad + gradient


class _Replayed(torch.autograd.Function):
    """A recorded pass among what is not; the first argument alone says that there are gradients."""

    @staticmethod
    def forward(ctx: Any, _: torch.Tensor, made: _Pass, batch: TokenBatch) -> torch.Tensor:
        ctx.made = made
        return made.forward(batch)

    @staticmethod
    def backward(ctx: Any, slope: torch.Tensor) -> tuple[None, None, None]:
        ctx.made.backward(slope)
        return None, None, None


# What a model is given of a batch.
_GIVEN = ("tokens", "positions", "segments", "bounds")


def _given(batch: TokenBatch) -> dict[str, torch.Tensor]:
    named = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return {name: named[name] for name in _GIVEN if named.get(name) is not None}
