"""The loss of a causal language model, computed only where it counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from loraport.training.data.batches import TokenBatch
from loraport.training.data.model_inputs import model_inputs
from loraport.training.losses.chunked_loss import (
    Reduction,
    linear_cross_entropy,
    module_cross_entropy,
)
from loraport.training.losses.loss import LossSum
from loraport.training.losses.output_head import logit_transform, output_head

_WIDE = 256_000  # what a vocabulary is taken for where the head does not say


# From a model, its output head and a batch to what the model gives the head.
HiddenStates = Callable[[nn.Module, nn.Module, TokenBatch], torch.Tensor]


def language_model_loss(
    model: nn.Module, batch: TokenBatch, hidden: HiddenStates | None = None
) -> LossSum:
    """Return the summed cross entropy of the labelled tokens, each from those before it.

    Logits are computed only for labelled tokens and a chunk at a time (see
    `loraport.training.losses.chunked_loss`), where the model's output head can be told apart.

    Args:
        model: A transformers causal language model.
        batch: Tokens ``[batch, length]``.
        hidden: Gives the head's input, ``[batch, length, dim]``; `hidden_before` where ``None``.
    """
    places = batch.learned().places  # [n]
    targets = batch.labels[:, 1:].flatten()[places]
    total = cross_entropy_at(model, batch, places, targets, hidden=hidden)
    return LossSum(total, places.numel(), batch.row_tokens)


def cross_entropy_at(
    model: nn.Module,
    batch: TokenBatch,
    positions: torch.Tensor,
    targets: torch.Tensor,
    reduction: Reduction = "sum",
    hidden: HiddenStates | None = None,
) -> torch.Tensor:
    """Return the cross entropy of the tokens that follow some positions.

    Args:
        model: A transformers causal language model.
        batch: Tokens ``[batch, length]``.
        positions: ``[n]``, indices into ``[batch, length - 1]`` flattened.
        targets: ``[n]``, the tokens that follow.
        reduction: ``"sum"`` for a scalar, ``"none"`` for each token's loss ``[n]``.
        hidden: Gives the head's input, ``[batch, length, dim]``; `hidden_before` where ``None``.
    """
    head = output_head(model)
    transform = None if head is None else logit_transform(model, head)
    if head is None or transform is None:
        logits = logits_at(model, batch, positions)  # [n, vocab]
        return F.cross_entropy(logits.float(), targets, reduction=reduction)
    states = (hidden or hidden_before)(model, head, batch)  # [batch, length, dim]
    states = states[:, :-1].flatten(0, 1).index_select(0, positions)  # [n, dim]
    if type(head) is nn.Linear and not head.weight.requires_grad:
        return linear_cross_entropy(
            states, head.weight, head.bias, targets, transform, reduction=reduction
        )
    vocabulary: int = getattr(head, "out_features", _WIDE)
    return module_cross_entropy(states, head, vocabulary, targets, transform, reduction=reduction)


def hidden_before(model: nn.Module, head: nn.Module, batch: TokenBatch) -> torch.Tensor:
    """Return what the model gives its head, ``[batch, length, dim]``; the head gets one token."""
    found: list[torch.Tensor] = []

    def take(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        found.append(inputs[0])
        return (inputs[0][:1, :1].detach(), *inputs[1:])

    inputs = model_inputs(model, batch)  # may try the model: before the hook is there
    hook = head.register_forward_pre_hook(take)
    try:
        model(**inputs)
    finally:
        hook.remove()
    return found[0]


def logits_at(model: nn.Module, batch: TokenBatch, positions: torch.Tensor) -> torch.Tensor:
    """Return the logits ``[n, vocab]`` at some positions.

    The output head is the widest layer of a small model, so hidden states are picked before
    it, by a hook that leaves the rest of the model's own forward pass as it is. Where the head
    is not found, or takes something unexpected, the logits are picked afterwards.

    Args:
        model: A transformers causal language model.
        batch: Tokens ``[batch, length]``.
        positions: ``[n]``, indices into ``[batch, length - 1]`` flattened.
    """
    picked = False

    def pick(values: torch.Tensor) -> torch.Tensor:
        return values[:, :-1].flatten(0, 1).index_select(0, positions)

    def before_head(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        nonlocal picked
        if len(inputs) != 1 or inputs[0].dim() != 3 or inputs[0].shape[:2] != batch.tokens.shape:
            return None
        picked = True
        return (pick(inputs[0]),)

    find_head = getattr(model, "get_output_embeddings", None)
    head = find_head() if callable(find_head) else None
    inputs = model_inputs(model, batch)  # may try the model: before the hook is there
    hook = head.register_forward_pre_hook(before_head) if head is not None else None
    try:
        output = model(**inputs)
    finally:
        if hook is not None:
            hook.remove()
    logits: torch.Tensor = output.logits
    return logits if picked else pick(logits)
