"""Output head and cross entropy together, a few tokens at a time.

The logits of all tokens, ``[tokens, vocab]`` in float32, are often the largest tensor of a
training step, and autograd keeps several copies. Here a chunk of tokens goes through the head,
the loss and, at once, back to the hidden states; only that gradient ``[tokens, dim]`` is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from loraport.training.lora.lora_function import product_dtype

Reduction = Literal["sum", "none"]

_CHUNK_LOGITS = 1 << 24  # 64 MB in float32: large enough for an efficient product


@dataclass(frozen=True)
class LogitTransform:
    """What some models do to the output head's result: ``cap * tanh(scale * z / cap)``.

    Attributes:
        scale: Factor (Cohere's ``logit_scale``, the inverse of Granite's ``logits_scaling``).
        softcap: Bound (Gemma 2's ``final_logit_softcapping``); ``None`` for none.
    """

    scale: float = 1.0
    softcap: float | None = None

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the model's logits from its head's."""
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    transform: LogitTransform | None = None,
    chunk: int | None = None,
    reduction: Reduction = "sum",
) -> torch.Tensor:
    """Return the cross entropy of ``transform(hidden W^T + bias)``, in float32 at least.

    Products are in the dtype of ``W`` (of autocast, where it is on); softmax and sum are not.

    Args:
        hidden: ``[n, dim]``.
        weight: ``[vocab, dim]``, frozen.
        bias: ``[vocab]``, frozen, or ``None``.
        targets: ``[n]`` int64.
        transform: What becomes of the logits; nothing where ``None``.
        chunk: Tokens at a time; chosen from the vocabulary's size where ``None``.
        reduction: ``"sum"`` for a scalar, ``"none"`` for each token's loss ``[n]``.
    """
    dtype = product_dtype(hidden.device.type, weight.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        losses: torch.Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
            hidden,
            weight.to(dtype),
            None if bias is None else bias.to(dtype),
            targets,
            transform or LogitTransform(),
            chunk or chunk_size(weight.shape[0]),
        )
    return losses.sum() if reduction == "sum" else losses


def module_cross_entropy(
    hidden: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    vocabulary: int,
    targets: torch.Tensor,
    transform: LogitTransform | None = None,
    chunk: int | None = None,
    reduction: Reduction = "sum",
) -> torch.Tensor:
    """Return the same for a head of any kind (quantized, with LoRA), which is computed twice.

    Args:
        hidden: ``[n, dim]``.
        head: From ``[n, dim]`` to ``[n, vocab]``, differentiable.
        vocabulary: Its outputs.
        targets: ``[n]`` int64.
        transform: What becomes of the logits; nothing where ``None``.
        chunk: Tokens at a time; chosen from the vocabulary's size where ``None``.
        reduction: ``"sum"`` for a scalar, ``"none"`` for each token's loss ``[n]``.
    """

    def one(part: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        logits = (transform or LogitTransform())(_at_least_float32(head(part)))
        return F.cross_entropy(logits, target, reduction=reduction)

    size = chunk or chunk_size(vocabulary)
    parts = zip(torch.split(hidden, size), torch.split(targets, size), strict=True)
    losses = [checkpoint(one, part, target, use_reentrant=False) for part, target in parts]
    if not losses:
        return hidden.sum() * 0.0 if reduction == "sum" else hidden.sum(dim=-1)
    return torch.stack(losses).sum() if reduction == "sum" else torch.cat(losses)


def chunk_size(vocabulary: int) -> int:
    """Return how many tokens go through a head at a time.

    >>> chunk_size(49152), chunk_size(256000)
    (341, 65)
    """
    return max(32, _CHUNK_LOGITS // vocabulary)


def _at_least_float32(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        transform: LogitTransform,
        chunk: int,
    ) -> torch.Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        losses = torch.empty(hidden.shape[0], dtype=wide, device=hidden.device)
        wanted = ctx.needs_input_grad[0]
        gradient = torch.empty_like(hidden) if wanted else None
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            target = targets[rows, None]  # [c, 1]
            raw = F.linear(hidden[rows].to(weight.dtype), weight, bias)  # [c, vocab]
            logits = transform(_at_least_float32(raw))
            log_probability = F.log_softmax(logits, dim=-1)
            losses[rows] = -log_probability.gather(1, target)[:, 0]
            if gradient is None:
                continue
            slope = log_probability.exp_()  # of the loss by the logits: softmax - one-hot
            slope.scatter_add_(1, target, slope.new_full(target.shape, -1.0))
            if transform.softcap is not None:
                slope *= 1 - (logits / transform.softcap).square()
            slope *= transform.scale
            gradient[rows] = slope.to(weight.dtype) @ weight
        ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_losses: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        # A token's loss depends on its own hidden state alone.
        scaled = None if gradient is None else gradient * grad_losses[:, None].to(gradient.dtype)
        return scaled, None, None, None, None, None
