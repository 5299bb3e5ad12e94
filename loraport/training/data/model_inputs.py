"""What a batch becomes for a model, and which short cuts the model allows.

Whether a model keeps rows of one sequence apart, and whether it needs to be told of padding, is
measured with the model itself, by running it on a few tokens: architectures differ (recurrent
layers, own masks, masks that reach to both sides), and a wrong guess would train silently on
mixed rows.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from loraport.training.data.batches import Row, TokenBatch, collate
from loraport.training.data.end_to_end import SegmentedBatch, attention_mask, lay_end_to_end
from loraport.training.modes import evaluation_mode

# Of the change that wrong attention makes; kernels for other shapes round otherwise.
_APART = 0.2
# The same where shapes are alike, and only mixtures of experts round otherwise.
_UNTOUCHED = 0.01
# What the length up to which attention looks back is called.
_WINDOWS = (
    *("sliding_window", "sliding_window_size", "attention_chunk_size"),
    *("window_size", "attention_window_size", "local_attention", "keep_window_size"),
)


@dataclass(frozen=True)
class Shortcuts:
    """What a model computes rightly.

    Attributes:
        padding_unseen: Right padding need not be masked: no real token looks at it.
        rows_apart: Rows of one sequence do not see each other, given positions and a mask.
        longest: Tokens of a sequence up to which that holds (a sliding window ends it).
    """

    padding_unseen: bool
    rows_apart: bool
    longest: int


# Under this name transformers finds the attention of `loraport.training.kernels.row_attention`.
ROW_ATTENTION = "loraport_rows"

_measured: weakref.WeakKeyDictionary[nn.Module, Shortcuts] = weakref.WeakKeyDictionary()


def shortcuts(model: nn.Module) -> Shortcuts:
    """Measure a model's short cuts; the answer is remembered.

    Args:
        model: A transformers causal language model.
    """
    if model not in _measured:
        _measured[model] = _measure(model)
    return _measured[model]


def assume_shortcuts(model: nn.Module, found: Shortcuts) -> None:
    """Tell what a model's short cuts are, where it has no weights to measure them with."""
    _measured[model] = found


def attention_window(model: nn.Module) -> int:
    """Return the length up to which every token may attend to all before it."""
    sizes = [_setting(model, name) for name in _WINDOWS]
    return min([size for size in sizes if size] or [1 << 62])


def model_inputs(model: nn.Module, batch: TokenBatch) -> dict[str, Any]:
    """Return a model's arguments for a batch.

    Args:
        model: A transformers causal language model.
        batch: Padded rows, or rows end to end.
    """
    if isinstance(batch, SegmentedBatch):
        return _inputs(batch.tokens, _allowed(model, batch), batch.positions)
    # Measured whether or not this batch has padding: all processes of a run take part.
    unseen = shortcuts(model).padding_unseen
    mask = batch.mask
    if mask is not None and unseen:
        mask = None  # attention without a mask needs no [length, length] tensor
    return _inputs(batch.tokens, mask)


def attends_within_rows(model: nn.Module) -> bool:
    """Tell whether a model is told where rows begin (`loraport.training.kernels.row_attention`)."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None) == ROW_ATTENTION


def _allowed(model: nn.Module, batch: SegmentedBatch) -> torch.Tensor:
    """Return a mask, or where rows begin."""
    bounds = batch.bounds if attends_within_rows(model) else None
    if bounds is not None:
        return bounds[None, None, None]
    assert batch.segments is not None
    return _as_model_wants(attention_mask(batch.segments), model)


def trial_rows(vocabulary: int) -> list[Row]:
    """Return two rows of seven tokens that begin alike, drawn from a vocabulary."""
    numbers = torch.Generator().manual_seed(0)
    drawn = torch.randint(vocabulary, (11,), generator=numbers).tolist()
    beginning, rest = drawn[:3], (drawn[3:7], drawn[7:])
    return [Row((*beginning, *end), (-100,) * 5 + tuple(end[2:])) for end in rest]


def _another(row: Row, vocabulary: int) -> Row:
    """Return a trial row that ends otherwise, and shares as much as before with the other one."""
    rest = [(token + 1) % vocabulary for token in row.tokens[4:]]
    return Row((*row.tokens[:4], *rest), row.labels)


def _inputs(
    tokens: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor | None = None
) -> dict[str, Any]:
    inputs = {"input_ids": tokens, "attention_mask": mask, "use_cache": False}
    return inputs if positions is None else {**inputs, "position_ids": positions}


def _as_model_wants(mask: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """Return a bool mask, or for attention that adds its mask, numbers to add."""
    if getattr(getattr(model, "config", None), "_attn_implementation", None) != "eager":
        return mask
    dtype: torch.dtype = getattr(model, "dtype", torch.float32)
    lowest = torch.finfo(dtype).min
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, lowest)


@torch.no_grad()
def _measure(model: nn.Module) -> Shortcuts:
    vocabulary = _setting(model, "vocab_size") or 2
    rows = trial_rows(vocabulary)
    device = next(model.parameters()).device
    alone = collate(rows, 0).tokens.to(device)
    together, other = (
        lay_end_to_end([pair], 0).to(device)
        for pair in (rows, [_another(rows[0], vocabulary), rows[1]])
    )
    assert together.segments is not None
    with evaluation_mode(model):
        try:
            apart = model(**_inputs(alone, None)).logits
            short = model(**_inputs(alone[:, :5], None)).logits
            padding = near(short, apart[:, :5], model(**_inputs(alone.flip(1), None)).logits[:, :5])
            laid, beside = (model(**model_inputs(model, b)).logits[0] for b in (together, other))
            open_mask = _as_model_wants(attention_mask(torch.zeros_like(together.segments)), model)
            mixed, changed = (
                model(**_inputs(b.tokens, open_mask, b.positions)).logits[0]
                for b in (together, other)
            )
        except (TypeError, ValueError, RuntimeError, IndexError, NotImplementedError):
            # It does not take such arguments: then it is used as it wants to be.
            return Shortcuts(False, False, 0)
    expected = torch.cat([apart[0], apart[1, 3:]])  # the beginning is there once
    # A little of the row before may come through (RecurrentGemma's state), unseen among rounding.
    leak, control = (
        (a[-4:] - b[-4:]).float().norm() for a, b in ((laid, beside), (mixed, changed))
    )
    rows_apart = near(laid, expected, mixed) and bool(leak <= _UNTOUCHED * control)
    return Shortcuts(padding, rows_apart, attention_window(model))


def near(got: torch.Tensor, expected: torch.Tensor, wrong: torch.Tensor) -> bool:
    """Tell whether a result is what is expected, measured by how far a wrong one is off."""
    if got.shape != expected.shape or not bool(got.isfinite().all()):
        return False
    off, control = (got - expected).float().norm(), (wrong - expected).float().norm()
    return bool(off <= _APART * control)


def _setting(model: nn.Module, name: str) -> int | None:
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    settings: Mapping[str, Any] = getattr(text, "__dict__", {})
    value = settings.get(name)
    return value if isinstance(value, int) else None
