"""Chats as rows of tokens: what the model is asked after, and what it is to answer there."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from loraport.training.data.batches import IGNORED, Row
from loraport.training.data.records import is_learned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SHOWN = 40  # letters of a rendered chat in an error


class UnusableError(Exception):
    """Why a record cannot be tokenized."""


@dataclass(frozen=True)
class _Answer:
    """An assistant's turn: the chat rendered up to its end, and where its text begins in it."""

    text: str
    start: int


def chat_rows(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Row]:
    """Return the rows of a chat, in which each turn that is to be learned is learned once.

    It is learned after exactly what the model is given when it is asked for it. With most
    templates the whole chat is one row. Some write a turn otherwise once others follow (Qwen3
    leaves out its thoughts): such a turn ends a row of its own.

    Args:
        messages: The turns, of which one is learned at least.
        tools: What the assistant can call.
        tokenizer: A fast one, with a chat template.

    Raises:
        UnusableError: If the template refuses the chat, or a turn does not begin with the prompt
            that asks for it.
    """

    def render(turns: Sequence[Mapping[str, Any]], *, prompt: bool = False) -> str:
        return _render(turns, tools, tokenizer, prompt=prompt)

    answers: list[_Answer] = []
    for index, message in enumerate(messages):
        if not is_learned(message):
            continue
        text = render(messages[: index + 1])
        asked = render(messages[:index], prompt=True) if index else _opening(text, render)
        if not text.startswith(asked):
            same = len(_beginning(text, asked))
            raise UnusableError(
                f"messages[{index}]: expected a chat template that writes a turn after the prompt "
                f"that asks for it, got one whose prompt ends with {asked[same:][-_SHOWN:]!r} "
                f"where it writes {text[same:][:_SHOWN]!r}; what follows that prompt is not in "
                'the row: use "prompt" with "completion"'
            )
        answers.append(_Answer(text, len(asked)))
    rows = []
    whole = render(messages)
    while answers:
        learned = [answer for answer in answers if whole.startswith(answer.text)]
        if learned:
            rows.append(_row(whole, [(each.start, len(each.text)) for each in learned], tokenizer))
        answers = [answer for answer in answers if answer not in learned]
        whole = answers[-1].text if answers else whole
    return rows[::-1]


def _row(whole: str, spans: Sequence[tuple[int, int]], tokenizer: PreTrainedTokenizerBase) -> Row:
    tokens, offsets = _encoded(whole, (), tokenizer)
    bounds = sorted({bound for span in spans for bound in span})
    melted = [bound for bound in bounds if _between(offsets, bound, bound)]
    if melted:  # into one token; at inference the prompt stands alone
        tokens, offsets = _encoded(whole, melted, tokenizer)
    labels = [IGNORED] * len(tokens)
    end = tokenizer.eos_token_id  # asked for once: it is looked up by name
    for start_at, end_at in spans:
        inside = _between(offsets, start_at, end_at)
        # What a template writes after the end-of-turn token is never generated.
        ends = [i for i in inside if tokens[i] == end]
        if not ends:  # Gemma's and Phi's turns end with another token than texts do
            special = _special(tokenizer)
            marks = [i for i in inside if tokens[i] in special][-1:]
            ends = [i for i in marks if not whole[offsets[i][1] : end_at].strip()]
        for i in inside:
            if not ends or i <= ends[-1]:
                labels[i] = tokens[i]
    return Row(tuple(tokens), tuple(labels))


def _between(offsets: Sequence[tuple[int, int]], start: int, end: int) -> range:
    """Return which tokens hold something between two places of the text, or reach over one.

    Tokens stand in the text's order, so a long chat is not gone through for every turn of it.
    """
    first = bisect_right(offsets, start, key=itemgetter(1))
    return range(first, bisect_left(offsets, end, key=itemgetter(0)))


def _special(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    added = tokenizer.added_tokens_decoder
    return {number for number, token in added.items() if token.special}


def _encoded(
    text: str, bounds: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[tuple[int, int]]]:
    """Return tokens, and where each stands in the text; none reaches over a bound."""
    tokens, offsets = [], []
    for start, end in pairwise((0, *bounds, len(text))):
        part = tokenizer(text[start:end], add_special_tokens=False, return_offsets_mapping=True)
        tokens += part["input_ids"]
        offsets += [(start + first, start + last) for first, last in part["offset_mapping"]]
    return tokens, offsets


def _opening(first_turn: str, render: Callable[[Sequence[Mapping[str, Any]]], str]) -> str:
    """Return what a template writes before the text of a turn that begins a chat.

    Many templates refuse a chat of no turns, so it is what turns of other texts have, too.
    """
    others = [render([{"role": "assistant", "content": text}]) for text in "ab"]
    return _beginning(first_turn, *others)


def _beginning(*texts: str) -> str:
    """Return what all texts begin with."""
    together = zip(*texts, strict=False)
    return "".join(letters[0] for letters in takewhile(lambda each: len(set(each)) == 1, together))


def _render(
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: bool,
) -> str:
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] or None,
            tokenize=False,
            add_generation_prompt=prompt,
        )
    except (TemplateError, ValueError, TypeError, KeyError) as error:
        raise UnusableError(f"the chat template refuses it: {error}") from error
    return str(text)
