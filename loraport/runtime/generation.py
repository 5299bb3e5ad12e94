"""Generate text with a bundle's KV cache."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loraport.errors import LoraportError, Problems
from loraport.runtime.model import Runtime, Selection
from loraport.runtime.values import FLOATS

GENAI_CONFIG = "genai_config.json"


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
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            problems.add("temperature", "a finite number, 0 or more", str(self.temperature))
        if not 0 < self.top_p <= 1:
            problems.add("top_p", "more than 0, at most 1", str(self.top_p))
        if self.seed < 0:
            problems.add("seed", "0 or more", str(self.seed))
        problems.raise_if_any("how to sample")


@dataclass(frozen=True)
class Decoder:
    """Names and sizes of a decoder's inputs, from ``genai_config.json``.

    Attributes:
        layers: Number of attention layers.
        cache_shape: ``[1, kv_heads, 0, head_dim]`` of an empty cache.
        past: Input names of the cache, with ``%d`` for the layer: key and value.
        present: Output names that become the next step's ``past``.
        stop_ids: Tokens that end the text.
        context_length: Most tokens that fit.
        vocabulary: Number of tokens that there are.
    """

    layers: int
    cache_shape: tuple[int, int, int, int]
    past: tuple[str, str]
    present: tuple[str, str]
    stop_ids: frozenset[int]
    context_length: int
    vocabulary: int


def read_decoder(bundle: Path) -> Decoder:
    """Read what generation needs to know.

    Raises:
        LoraportError: If the bundle is no decoder language model.
    """
    try:
        model = json.loads((bundle / GENAI_CONFIG).read_bytes())["model"]
        decoder = model["decoder"]
        inputs, outputs = decoder["inputs"], decoder["outputs"]
        stop = model["eos_token_id"]
        return Decoder(
            layers=int(decoder["num_hidden_layers"]),
            cache_shape=(1, int(decoder["num_key_value_heads"]), 0, int(decoder["head_size"])),
            past=(inputs["past_key_names"], inputs["past_value_names"]),
            present=(outputs["present_key_names"], outputs["present_value_names"]),
            stop_ids=frozenset([stop] if isinstance(stop, int) else stop),
            context_length=int(model["context_length"]),
            vocabulary=int(model["vocab_size"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoraportError(
            f"{bundle}: expected a decoder language model with {GENAI_CONFIG}, got: {error!r}"
        ) from error


def first_step_inputs(
    runtime: Runtime, decoder: Decoder, token_ids: Sequence[int]
) -> dict[str, np.ndarray]:
    """Return all inputs of a run over a prompt with an empty cache."""
    names = {entry.name: entry.type for entry in runtime.session.get_inputs()}
    inputs = _token_inputs(names, token_ids, past=0)
    for layer in range(decoder.layers):
        for pattern in decoder.past:
            name = pattern % layer
            if name in names:
                dtype = FLOATS.get(names[name])
                if dtype is None:
                    raise LoraportError(f"input {name}: cannot be fed as {names[name]} from numpy")
                inputs[name] = np.zeros(decoder.cache_shape, dtype)
    return inputs


def generate(
    runtime: Runtime,
    token_ids: Sequence[int],
    adapter: Selection = None,
    sampling: Sampling | None = None,
) -> Iterator[int]:
    """Yield new tokens one by one, until a stop token or ``max_new_tokens``.

    Each call has its own lane and cache, so several threads may generate at once.

    Args:
        runtime: An opened bundle of a decoder language model.
        token_ids: The prompt, at least one token.
        adapter: A name, names with strengths, or ``None`` for the base.
        sampling: Greedy unless told.

    Raises:
        LoraportError: If the prompt is empty, too long or not of tokens, the bundle is no decoder,
            or it gives no finite logits.
    """
    sampling = sampling or Sampling()
    decoder = read_decoder(runtime.directory)
    if not 0 < len(token_ids) < decoder.context_length:
        raise LoraportError(
            f"prompt: expected 1 to {decoder.context_length - 1} tokens, got {len(token_ids)}"
        )
    unknown = next((each for each in token_ids if not 0 <= each < decoder.vocabulary), None)
    if unknown is not None:
        raise LoraportError(
            f"prompt: expected tokens from 0 to {decoder.vocabulary - 1}, got {unknown}"
        )
    lane = runtime.lane(adapter)
    random = np.random.default_rng(sampling.seed)
    types = {entry.name: entry.type for entry in runtime.session.get_inputs()}
    inputs: dict[str, Any] = dict(first_step_inputs(runtime, decoder, token_ids))
    length = len(token_ids)
    for _ in range(min(sampling.max_new_tokens, decoder.context_length - length)):
        outputs = lane.run_on_device(inputs)
        logits = outputs["logits"].numpy()[0, -1].astype(np.float32)
        token = _choose(logits, sampling, random)
        if token in decoder.stop_ids:
            return
        yield token
        inputs = _token_inputs(types, [token], past=length)
        for layer in range(decoder.layers):
            for past, present in zip(decoder.past, decoder.present, strict=True):
                if past % layer in types:
                    inputs[past % layer] = outputs[present % layer]
        length += 1


def _token_inputs(
    names: Mapping[str, str], token_ids: Sequence[int], *, past: int
) -> dict[str, Any]:
    """Return the inputs that depend on the tokens; ``past`` tokens are in the cache."""
    stop = past + len(token_ids)
    inputs: dict[str, Any] = {"input_ids": np.array([token_ids], np.int64)}
    if "attention_mask" in names:
        inputs["attention_mask"] = np.ones((1, stop), np.int64)
    if "position_ids" in names:
        inputs["position_ids"] = np.arange(past, stop, dtype=np.int64)[None]
    return inputs


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
