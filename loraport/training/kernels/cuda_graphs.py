"""``--cuda-graphs``: a model's forward and backward pass recorded once for each shape of batch.

A step of a small model is thousands of small operations, and a GPU waits for the host to name each.
A CUDA graph names them all at once. What is recorded is the model up to its output head; the loss,
whose shapes depend on how many tokens are learned, stays as it is. A recording is for one shape, so
batches come in few lengths (`loraport.training.data.packing.in_few_lengths`); a shape that is seen
for the first time runs as ever, at the second time it is recorded.

Source: CUDA programming guide, "CUDA Graphs"; PyTorch notes on CUDA semantics, "CUDA Graphs".
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import nn

from loraport.errors import LoraportError
from loraport.training.data.batches import TokenBatch
from loraport.training.data.end_to_end import SegmentedBatch
from loraport.training.lora.inject import lora_layers
from loraport.training.losses.language_model import hidden_before
from loraport.training.losses.output_head import logit_transform, output_head
from loraport.training.options import TrainOptions


class Recorder(Protocol):
    """Records what functions have a device do, on a stream of work of its own."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Return what repeats what a function has the device do, without the function."""
        ...

    def stream(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which all that is not recorded has to run, too."""
        ...


_MOST = 64  # recordings: each keeps its output, and what CUDA needs to know of it


def require_recordable(device: torch.device, options: TrainOptions) -> None:
    """Refuse what cannot be recorded whatever the model.

    Args:
        device: Where it computes.
        options: How it trains.

    Raises:
        LoraportError: If the device is no GPU, activations are computed again (which asks for the
            state of the random numbers), or layers are compiled.
    """
    if device.type != "cuda":
        raise LoraportError(
            f"--cuda-graphs: expected a CUDA GPU, got {device}; leave out --cuda-graphs"
        )
    others = {
        "--gradient-checkpointing": options.gradient_checkpointing,
        "--compile": options.compile,
    }
    for flag in [flag for flag, given in others.items() if given]:
        raise LoraportError(f"--cuda-graphs: expected no {flag} beside it; leave out one of them")


class RecordedPasses:
    """Gives `language_model_loss` the hidden states of a model that trains on one GPU.

    Training runs in the context `stream`: autograd remembers on which stream it first met a
    matrix, and waits for that one when the matrix gets its gradient, which while another stream is
    recorded is an error.

    Args:
        model: A transformers causal language model with LoRA layers, in training mode when called.
        record: See `Recorder`; CUDA's where ``None``.

    Raises:
        LoraportError: If the model's output head cannot be told apart.
    """

    def __init__(self, model: nn.Module, record: Recorder | None = None) -> None:
        head = output_head(model)
        if head is None or logit_transform(model, head) is None:
            raise LoraportError(
                f"--cuda-graphs: expected a model whose output head can be told apart, got "
                f"{type(model).__name__}; leave out --cuda-graphs"
            )
        self._model, self._layer = model, next(iter(lora_layers(model).values()))
        self._record = record or _OnGpu()
        self._passes: dict[Hashable, _Pass | None] = {}
        self._gradients: dict[torch.Tensor, torch.Tensor] = {}

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
        if not recordable or model is not self._model:
            return hidden_before(model, head, batch)
        # Another run has rounded copies of its own; those of recordings live as long as these.
        leaves = id(self._layer.rounded[0]) if self._layer.rounded else None
        key = (leaves, *((name, tensor.shape) for name, tensor in _given(batch).items()))
        if key not in self._passes:
            if len(self._passes) < _MOST:
                self._passes[key] = None
            return hidden_before(model, head, batch)
        made = self._passes[key]
        if made is None:
            made = _Pass(model, head, batch, self._record, self._gradients)
            self._passes[key] = made
        hidden: torch.Tensor = _Replayed.apply(made.leaves[0], made, batch)  # type: ignore[no-untyped-call]
        return hidden


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
        gradients: dict[torch.Tensor, torch.Tensor],
    ) -> None:
        matrices = [p for p in model.parameters() if p.requires_grad]
        rounded = [each for layer in lora_layers(model).values() for each in layer.rounded or ()]
        self.leaves = [*matrices, *rounded]
        self._taken_at_once = set(rounded)  # their gradients, by `RoundedMatrices`
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
            reason = str(cause).strip().splitlines()[0]
            raise LoraportError(
                f"--cuda-graphs: a pass of {type(model).__name__} cannot be recorded: {reason}; "
                "leave out --cuda-graphs"
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


class _OnGpu:
    """CUDA's recorder, with one pool of memory: two recordings are never under way at once."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(
            graph,
            pool=self._pool,
            stream=self._stream,
            capture_error_mode="thread_local",  # autograd's own thread takes part
        )
        with torch.cuda.stream(self._stream), recording:  # which leaves its stream where it fails
            run()
        return graph.replay

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        outside = torch.cuda.current_stream()
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outside.wait_stream(self._stream)
