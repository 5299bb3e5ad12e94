"""Loss and token accuracy of every row, and greedy answers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from loraport.training.data.batches import IGNORED, Row, collate
from loraport.training.losses.language_model import logits_at

# What transformers calls a cache of its models: since 5.24, which knows the old name with a warning
# alone, and before.
_CACHES = ("cache", "past_key_values")


@dataclass(frozen=True)
class RowScore:
    """What a model makes of one row.

    Attributes:
        line: The row's line in its file.
        tokens: Tokens that count.
        loss: Mean cross entropy of these, in nats.
        correct: How many of them are the likeliest token.
    """

    line: int
    tokens: int
    loss: float
    correct: int


@torch.no_grad()
def score_rows(
    model: nn.Module,
    rows: Sequence[Row],
    batch_size: int,
    pad: int,
    device: torch.device,
    done: Callable[[int], None] = lambda rows: None,  # noqa: ARG005
) -> list[RowScore]:
    """Return each row's score, in the rows' order.

    Args:
        model: A transformers causal language model in evaluation mode.
        rows: What to score.
        batch_size: Rows per forward pass; rows of like length share one.
        pad: Token id to pad with.
        device: Where the model is.
        done: Told how many rows more are scored.
    """
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].tokens))
    scores: dict[int, RowScore] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        batch = collate([rows[index] for index in chosen], pad).to(device)
        targets = batch.labels[:, 1:]
        counted = (targets.flatten() != IGNORED).nonzero().flatten()  # [n]
        wanted = targets.flatten()[counted]
        logits = logits_at(model, batch, counted).float()  # [n, vocab]
        losses = F.cross_entropy(logits, wanted, reduction="none").double().cpu()
        right = (logits.argmax(-1) == wanted).cpu()
        owner = (counted // targets.shape[1]).cpu()
        for position, index in enumerate(chosen):
            mine = owner == position
            scores[index] = RowScore(
                line=rows[index].line,
                tokens=int(mine.sum()),
                loss=float(losses[mine].mean()),
                correct=int(right[mine].sum()),
            )
        done(len(chosen))
    return [scores[index] for index in range(len(rows))]


def question_and_answer(row: Row) -> tuple[list[int], list[int]] | None:
    """Split a row before its last answer; ``None`` where nothing stands before it.

    >>> question_and_answer(Row((5, 6, 7, 8), (-100, -100, 7, 8)))
    ([5, 6], [7, 8])
    """
    end = len(row.labels)
    while end and row.labels[end - 1] == IGNORED:
        end -= 1
    start = end
    while start and row.labels[start - 1] != IGNORED:
        start -= 1
    return (list(row.tokens[:start]), list(row.tokens[start:end])) if start else None


@torch.no_grad()
def greedy_answer(
    model: Any, question: Sequence[int], length: int, ends: Collection[int], device: torch.device
) -> list[int]:
    """Return up to ``length`` tokens, each the likeliest after those before it.

    Args:
        model: A transformers causal language model in evaluation mode.
        question: Tokens to go on from.
        length: Most tokens to generate.
        ends: Tokens after each of which to stop.
        device: Where the model is.
    """
    answer: list[int] = []
    new = list(question)
    cached: dict[str, Any] = {}
    for _ in range(length):
        output = model(input_ids=torch.tensor([new], device=device), use_cache=True, **cached)
        answer.append(int(output.logits[0, -1].argmax()))
        if answer[-1] in ends:
            break
        names = list(output.keys())
        # A model that keeps something else (before 5.24, Mamba's state) reads all of it again.
        cached = {name: output[name] for name in _CACHES if name in names}
        new = answer[-1:] if cached else [*question, *answer]
    return answer
