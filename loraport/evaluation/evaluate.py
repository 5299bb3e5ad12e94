"""The base beside every adapter, on one copy of the base in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from loraport.adapter import Adapter, require_adapters
from loraport.base.context_length import context_of
from loraport.errors import LoraportError
from loraport.evaluation.neutral_text import PARAGRAPHS
from loraport.evaluation.scores import RowScore, greedy_answer, question_and_answer, score_rows
from loraport.training.data.batches import Row
from loraport.training.lora.inject import detach
from loraport.training.lora.load import load_into

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

BASE = "base"
# An adapter on a narrow task moves the base's own text by a percent or two; beyond this it forgets.
FORGETTING = 0.05
# The same forward pass with other kernels or batch shapes differs by less in float32.
NOISE = 1e-5
_PIECE = 512  # tokens of neutral text at once


@dataclass(frozen=True)
class Answer:
    """A greedy answer beside the expected one.

    Attributes:
        line: The row's line in its file.
        expected: What the row says.
        got: What the model says.
        row: The row's place among all, from 0: a line can be several rows.
        ended: Whether the model ends it where the row does, rather than going on.
    """

    line: int
    expected: str
    got: str
    row: int
    ended: bool = True

    @property
    def exact(self) -> bool:
        """Whether both are the same text, but for blanks around it, and end there."""
        return self.ended and self.expected.strip() == self.got.strip()


@dataclass(frozen=True)
class Scores:
    """One model's results.

    Attributes:
        name: The adapter's, or ``base``.
        loss: Mean cross entropy per counted token, in nats.
        perplexity: ``exp(loss)``.
        token_accuracy: Share of counted tokens that are the likeliest one.
        exact_match: Share of greedy answers that are the expected ones; ``None`` without any.
        held_out_loss: Loss on the held-out text.
        rows: Row by row.
        answers: The answers generated.
    """

    name: str
    loss: float
    perplexity: float
    token_accuracy: float
    exact_match: float | None
    held_out_loss: float
    rows: tuple[RowScore, ...]
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Evaluation:
    """The base first, then the adapters, and what is to be warned of."""

    scores: tuple[Scores, ...]
    warnings: tuple[str, ...]


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    adapters: Mapping[str, Adapter],
    rows: Sequence[Row],
    *,
    held_out: Sequence[Row] | None = None,
    generations: int = 100,
    batch_size: int = 4,
    progress: Callable[[str, int, int], None] = lambda name, done, total: None,  # noqa: ARG005
) -> Evaluation:
    """Score a base and adapters on the same rows; the model is left as it was.

    Args:
        model: The base, in evaluation mode; each adapter is put in and taken out again.
        tokenizer: The base's.
        adapters: Name → adapter.
        rows: At least one.
        held_out: Text that the adapters should not make worse; a small neutral one unless given.
        generations: Rows whose last answer is generated and compared, from the first on.
        batch_size: Rows per forward pass.
        progress: Told which model is being scored, and how many rows and answers are done, of
            how many with all models.

    Raises:
        LoraportError: If there are no rows, held out or not, or an adapter does not fit the base.
    """
    require_adapters(adapters)
    if not rows:
        raise LoraportError("evaluation: expected rows, got none")
    if BASE in adapters:
        raise LoraportError(f"adapter {BASE!r}: expected another name, this one means no adapter")
    if held_out is None:
        held_out = neutral_rows(tokenizer, context_of(model.config) or _PIECE)
    if not held_out:
        raise LoraportError(
            "held-out text: expected a paragraph of at least two tokens, since the first is never "
            "predicted, got none; give more text"
        )

    for name, adapter in adapters.items():  # or minutes of scores are lost with a later one
        try:
            load_into(model, adapter)
        except LoraportError as error:
            raise LoraportError(f"adapter {name!r}: {error}") from error
        detach(model)
    each = len(rows) + len(held_out) + len(rows[:generations])
    total, done = each * (1 + len(adapters)), 0

    def scored(name: str) -> Scores:
        def tell(count: int) -> None:
            nonlocal done
            done += count
            progress(name, done, total)

        tell(0)
        return _score(model, tokenizer, name, rows, held_out, generations, batch_size, tell)

    found = [scored(BASE)]
    for name, adapter in adapters.items():
        load_into(model, adapter)
        try:
            model.eval()
            found.append(scored(name))
        finally:
            detach(model)
    return Evaluation(tuple(found), tuple(_warnings(found)))


def neutral_rows(tokenizer: PreTrainedTokenizerBase, longest: int = _PIECE) -> list[Row]:
    """Return the built-in neutral text as rows, none of more tokens than ``longest``."""
    return text_rows(PARAGRAPHS, tokenizer, min(longest, _PIECE))


def text_rows(
    paragraphs: Sequence[str], tokenizer: PreTrainedTokenizerBase, longest: int
) -> list[Row]:
    """Return texts as rows of which every token counts; long ones are cut into pieces."""
    rows = []
    for paragraph in paragraphs:
        tokens = tokenizer(paragraph)["input_ids"]
        pieces = [tokens[i : i + longest] for i in range(0, len(tokens), longest)]
        rows += [Row(tuple(piece), tuple(piece)) for piece in pieces if len(piece) > 1]
    return rows


def _score(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    rows: Sequence[Row],
    held_out: Sequence[Row],
    generations: int,
    batch_size: int,
    tell: Callable[[int], None],
) -> Scores:
    pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    scores = score_rows(model, rows, batch_size, pad, model.device, tell)
    neutral = score_rows(model, held_out, batch_size, pad, model.device, tell)
    answers = []
    ends = _stop_tokens(model, tokenizer)
    for place, row in enumerate(rows[:generations]):
        parts = question_and_answer(row)
        if parts is not None:
            question, expected = parts
            got = greedy_answer(model, question, len(expected), ends, model.device)
            said, wanted = (
                str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in (got, expected)
            )
            # A row that was cut has no end, nor does an answer that is as long.
            ended = expected[-1] not in ends or got[-1] in ends
            answers.append(Answer(row.line, wanted, said, place, ended))
        tell(1)
    loss = _mean_loss(scores)
    return Scores(
        name=name,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        token_accuracy=sum(s.correct for s in scores) / sum(s.tokens for s in scores),
        exact_match=sum(a.exact for a in answers) / len(answers) if answers else None,
        held_out_loss=_mean_loss(neutral),
        rows=tuple(scores),
        answers=tuple(answers),
    )


def _stop_tokens(model: Any, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return what ends an answer: a model can have more than its tokenizer's end (Gemma, Phi)."""
    settings = getattr(model, "generation_config", None)
    told = getattr(settings, "eos_token_id", None)
    found: list[Any] = [tokenizer.eos_token_id, *(told if isinstance(told, list) else [told])]
    return {int(token) for token in found if token is not None}


def _mean_loss(scores: Sequence[RowScore]) -> float:
    return sum(s.loss * s.tokens for s in scores) / sum(s.tokens for s in scores)


def _warnings(found: Sequence[Scores]) -> list[str]:
    base, *others = found
    warnings = []
    for scores in found:
        remedy = (
            "train it at a lower learning rate" if scores is not base else "look at its weights"
        )
        for what, loss in (("", scores.loss), (" on held-out text", scores.held_out_loss)):
            if not math.isfinite(loss):
                warnings.append(
                    f"{scores.name}: expected a finite loss{what}, got {loss}; {remedy}"
                )
    for scores in others:
        pairs = zip(base.rows, scores.rows, strict=True)
        if all(abs(b.loss - s.loss) <= NOISE * (1 + b.loss) for b, s in pairs):
            warnings.append(
                f"{scores.name} does nothing: its loss equals the base's on every row; is it "
                "trained, and for this base?"
            )
        before, after = base.held_out_loss, scores.held_out_loss
        # Noise counts where the base is all but certain, and a loss of 0 has no share.
        if math.isfinite(after) and after > before * (1 + FORGETTING) + NOISE:
            share = f" ({after / before - 1:+.1%})" if before else ""
            warnings.append(
                f"{scores.name} forgets: the loss on held-out text goes from {before:.3f} to "
                f"{after:.3f}{share}; train for fewer steps, at a lower learning rate, or mix in "
                "general text"
            )
    return warnings
