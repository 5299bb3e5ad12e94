"""Generate text with a bundle's KV cache."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from loraport.errors import LoraportError, Problems
from loraport.option_checks import given_or_default, is_finite, is_whole, shown
from loraport.runtime.decoder import read_decoder
from loraport.runtime.model import Runtime, Selection, require_runtime
from loraport.runtime.steps import open_steps


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen.

    Attributes:
        max_new_tokens: Stop after so many.
        temperature: 0 takes the likeliest token (greedy).
        top_p: Sample from the smallest set of tokens whose probability reaches this.
        seed: Of the sampling.

    Raises:
        LoraportError: Naming every number that makes no sense.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        problems = Problems()
        for name in ("max_new_tokens", "seed"):
            number = getattr(self, name)
            if not is_whole(number) or number < 0:
                problems.add(name, "a whole number, 0 or more", shown(number))
        if not (is_finite(self.temperature) and self.temperature >= 0):
            problems.add("temperature", "a finite number, 0 or more", shown(self.temperature))
        if not (is_finite(self.top_p) and 0 < self.top_p <= 1):
            problems.add("top_p", "more than 0, at most 1", shown(self.top_p))
        problems.raise_if_any("how to sample")


def generate(
    runtime: Runtime,
    token_ids: Sequence[int],
    adapter: Selection = None,
    sampling: Sampling | None = None,
) -> Iterator[int]:
    """Yield new tokens one by one, until a stop token or ``max_new_tokens``.

    Each call has its own lane and cache, so several threads may generate at once. Where a longer
    text is rotated by other factors (longrope), the cache is computed anew once as many tokens
    are there, as transformers does.

    Args:
        runtime: An opened bundle of a decoder language model.
        token_ids: The prompt, at least one token: whole numbers ``[n]``.
        adapter: A name, names with strengths, or ``None`` for the base.
        sampling: Greedy unless told.

    Raises:
        LoraportError: If the prompt is empty, too long or not of tokens, the bundle is no decoder,
            or it gives no finite logits.
    """
    sampling = given_or_default(sampling, Sampling, "sampling")
    decoder = read_decoder(require_runtime(runtime).directory)
    token_ids = _whole_numbers(token_ids)
    if not 0 < len(token_ids) < decoder.context_length:
        raise LoraportError(
            f"prompt: expected 1 to {decoder.context_length - 1} tokens, got {len(token_ids)}"
        )
    unknown = next((each for each in token_ids if not 0 <= each < decoder.vocabulary), None)
    if unknown is not None:
        raise LoraportError(
            f"prompt: expected tokens from 0 to {decoder.vocabulary - 1}, got {unknown}"
        )
    random = np.random.default_rng(sampling.seed)
    most = min(sampling.max_new_tokens, decoder.context_length - len(token_ids))
    border = runtime.manifest.long_rotations_after
    new = text = token_ids
    with open_steps(runtime, decoder, adapter, len(token_ids) + most) as steps:
        for _ in range(most):
            token = _choose(steps.run(new), sampling, random)
            if token in decoder.stop_ids:
                return
            yield token
            text.append(token)
            new = [token]
            if len(text) - 1 == border:
                steps.forget()
                new = text


def _whole_numbers(token_ids: Sequence[int]) -> list[int]:
    whole: list[int] = []
    if not isinstance(token_ids, Iterable):
        raise LoraportError(f"prompt: expected tokens [n], whole numbers, got {token_ids!r}")
    for token in token_ids:
        try:
            whole.append(operator.index(token))
        except TypeError as error:
            raise LoraportError(
                f"prompt: expected tokens [n], whole numbers, got {token!r} among them; a batch of "
                "one is given as its row"
            ) from error
    return whole


def _choose(logits: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    largest = logits.max()
    if not np.isfinite(largest):  # NaN is the largest of all
        raise LoraportError(
            f"logits: expected finite numbers, got {largest}; the adapters' strengths may be too "
            "large"
        )
    if sampling.temperature == 0.0:
        return int(logits.argmax())
    with np.errstate(over="ignore"):  # then all but the likeliest have probability 0
        scaled = (logits.astype(np.float64) - largest) / sampling.temperature
    probabilities = np.exp(scaled)
    probabilities /= probabilities.sum()
    order = np.argsort(-probabilities)
    cumulative = np.cumsum(probabilities[order])
    kept = order[: int(np.searchsorted(cumulative, sampling.top_p)) + 1]
    return int(random.choice(kept, p=probabilities[kept] / probabilities[kept].sum()))
