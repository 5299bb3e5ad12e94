"""Attention of rows that lie end to end, each within itself, without a mask.

A mask over the whole sequence has a GPU compute every pair of tokens, also those of different
rows, and by a slower kernel. FlashAttention's kernel for sequences of many lengths (Dao 2023,
arXiv:2307.08691), which PyTorch brings along, is told where rows begin instead. transformers lets
attention be replaced by name; what is passed on as the mask then is the list of beginnings.

It is used where a trial with the model itself gives what masks give: models differ in what else
they ask of attention.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from loraport.training.data.end_to_end import attention_mask, lay_end_to_end
from loraport.training.data.model_inputs import (
    ROW_ATTENTION,
    model_inputs,
    near,
    shortcuts,
    trial_rows,
)
from loraport.training.devices import Placement
from loraport.training.modes import evaluation_mode, training_mode

# What models say beside queries, keys and values that changes nothing here.
_WITHOUT_EFFECT = frozenset(
    ("position_ids", "use_cache", "output_attentions", "is_causal", "cache_position")
)


def use_row_attention(model: nn.Module, placement: Placement, longest: int) -> bool:
    """Let a model attend within rows by FlashAttention, where that is right; the model stays so.

    Batches whose rows share a beginning still have a mask.

    Args:
        model: A transformers causal language model on its device.
        placement: Where and in which precision it trains.
        longest: Tokens of a row at most; an attention window must not be shorter.

    Returns:
        Whether it does.
    """
    config = getattr(model, "config", None)
    before = getattr(config, "_attn_implementation", None)
    usable = placement.device.type == "cuda" and placement.dtype is torch.bfloat16
    if not usable or before != "sdpa":
        return False
    able = shortcuts(model)
    if not able.rows_apart or able.longest < longest:
        return False
    try:
        _register()
        model.set_attn_implementation(ROW_ATTENTION)  # type: ignore[operator]
        right = _gives_the_same(model, placement)
    except (ImportError, AttributeError):
        return False  # an older PyTorch or transformers
    finally:
        config._attn_implementation = before  # type: ignore[union-attr]
    if right:
        model.set_attn_implementation(ROW_ATTENTION)  # type: ignore[operator]
    return right


def _register() -> None:
    from torch.nn.attention import varlen  # noqa: F401  is it there?
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(ROW_ATTENTION, attend)
    AttentionMaskInterface.register(ROW_ATTENTION, sdpa_mask)


@torch.no_grad()
def _gives_the_same(model: nn.Module, placement: Placement) -> bool:
    """Tell whether beginnings of rows give what masks give; a control lets rows see each other."""
    vocabulary = getattr(model.config, "vocab_size", None) or 2
    batch = lay_end_to_end([trial_rows(vocabulary)], 0, share=False).to(placement.device)
    assert batch.segments is not None
    inputs = model_inputs(model, batch)
    masks = [attention_mask(each) for each in (batch.segments, torch.zeros_like(batch.segments))]
    with evaluation_mode(model), placement.autocast():
        try:
            got = model(**inputs).logits
            expected, wrong = (model(**{**inputs, "attention_mask": mask}).logits for mask in masks)
            with training_mode(model):
                model(**inputs)  # some ask for more while they train: dropout of the weights
        except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
            return False
    return near(got, expected, wrong)


def attend(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    **more: Any,
) -> tuple[torch.Tensor, None]:
    """Return attention as transformers' models call it, ``[batch, length, heads, dim]``.

    Args:
        module: The layer.
        query: ``[batch, heads, length, dim]``.
        key: ``[batch, key heads, length, dim]``.
        value: Like ``key``.
        attention_mask: ``[1, 1, 1, n + 1]`` int32, where rows begin (see
            `loraport.training.data.end_to_end.SegmentedBatch.bounds`); anything else is left to
            transformers' own function.
        scaling: Factor of the scores; the usual one where ``None``.
        dropout: Of the weights, which only transformers' own function has.
        sliding_window: Tokens that each one sees, itself the last; all before it where ``None``.
        more: What else a model says.

    Raises:
        NotImplementedError: If a model asks for what the kernel does not do.
    """
    if attention_mask is None or attention_mask.dtype is not torch.int32:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        result: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            dropout=dropout,
            sliding_window=sliding_window,
            **more,
        )
        return result
    asked = {name for name, value in more.items() if value is not None} - _WITHOUT_EFFECT
    if asked or dropout:
        raise NotImplementedError(f"attention with {', '.join(sorted(asked)) or 'dropout'}")
    batch, _, length, _ = query.shape
    if torch.is_autocast_enabled(query.device.type):
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    query, key, value = (each.transpose(1, 2).flatten(0, 1) for each in (query, key, value))
    before = -1 if sliding_window is None else sliding_window - 1
    mixed = causal_rows(query, key, value, attention_mask.flatten(), length, scaling, before)
    return mixed.view(batch, length, *mixed.shape[1:]), None


def causal_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bounds: torch.Tensor,
    longest: int,
    scaling: float | None,
    before: int,
) -> torch.Tensor:
    """Return causal attention within each row, ``[tokens, heads, dim]``, on a GPU.

    Args:
        query: ``[tokens, heads, dim]``, in 16 bits.
        key: ``[tokens, key heads, dim]``.
        value: Like ``key``.
        bounds: ``[n + 1]`` int32, where rows begin and the last one ends.
        longest: Tokens of a row at most.
        scaling: Factor of the scores; the usual one where ``None``.
        before: Tokens before it that each one sees at most; -1 for all.
    """
    from torch.nn.attention.varlen import varlen_attn

    # Fewer heads of keys: newer versions want to be told.
    more: dict[str, Any] = {"enable_gqa": True} if _takes("enable_gqa", varlen_attn) else {}
    mixed = varlen_attn(
        query,
        key,
        value,
        bounds,
        bounds,
        longest,
        longest,
        scale=scaling,
        window_size=(before, 0),
        **more,
    )
    assert isinstance(mixed, torch.Tensor)
    return mixed


@functools.cache
def _takes(name: str, function: Callable[..., Any]) -> bool:
    return name in inspect.signature(function).parameters
