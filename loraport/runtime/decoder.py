"""A decoder language model's inputs and outputs, as ``genai_config.json`` names them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loraport.errors import LoraportError
from loraport.runtime.model import Runtime
from loraport.runtime.values import FLOATS

GENAI_CONFIG = "genai_config.json"


@dataclass(frozen=True)
class Decoder:
    """Names and sizes of a decoder's inputs, from ``genai_config.json``.

    Attributes:
        layers: Number of attention layers.
        cache_shape: ``[1, kv_heads, 0, head_dim]`` of an empty cache.
        past: Input names of the cache, with ``%d`` for the layer: key and value.
        present: Output names that become the next step's ``past``.
        in_place: A step may write into the cache that it reads, longer than what is in it.
        stop_ids: Tokens that end the text.
        context_length: Most tokens that fit.
        vocabulary: Number of tokens that there are.
    """

    layers: int
    cache_shape: tuple[int, int, int, int]
    past: tuple[str, str]
    present: tuple[str, str]
    in_place: bool
    stop_ids: frozenset[int]
    context_length: int
    vocabulary: int


def read_decoder(bundle: Path) -> Decoder:
    """Read what generation needs to know.

    Raises:
        LoraportError: If the bundle is no decoder language model.
    """
    try:
        config = json.loads((bundle / GENAI_CONFIG).read_bytes())
        model = config["model"]
        decoder = model["decoder"]
        inputs, outputs = decoder["inputs"], decoder["outputs"]
        stop = model["eos_token_id"]
        return Decoder(
            layers=int(decoder["num_hidden_layers"]),
            cache_shape=(1, int(decoder["num_key_value_heads"]), 0, int(decoder["head_size"])),
            past=(inputs["past_key_names"], inputs["past_value_names"]),
            present=(outputs["present_key_names"], outputs["present_value_names"]),
            in_place=config.get("search", {}).get("past_present_share_buffer") is True,
            stop_ids=frozenset([stop] if isinstance(stop, int) else stop),
            context_length=int(model["context_length"]),
            vocabulary=int(model["vocab_size"]),
        )
    except FileNotFoundError as error:
        raise LoraportError(
            f"{bundle}: expected a decoder language model with {GENAI_CONFIG}, got no such file: "
            "without it, the graph was exported by torch and has no cache to generate with; give "
            "it whole inputs in Python (loraport.runtime.Runtime(bundle).run), or compare it with "
            "PyTorch by loraport verify"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise LoraportError(
            f"{bundle}: expected a decoder language model with {GENAI_CONFIG}, got: {error!r}"
        ) from error


def first_step_inputs(
    runtime: Runtime, decoder: Decoder, token_ids: Sequence[int]
) -> dict[str, np.ndarray]:
    """Return all inputs of a run over a prompt with an empty cache."""
    names = {entry.name: entry.type for entry in runtime.session.get_inputs()}
    inputs = token_inputs(names, token_ids, past=0)
    for name, _ in cache_names(decoder, names):
        inputs[name] = np.zeros(decoder.cache_shape, cache_dtype(name, names))
    return inputs


def token_inputs(
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


def cache_names(decoder: Decoder, names: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return input and output names of the cache, of what the graph takes."""
    return [
        (past % layer, present % layer)
        for layer in range(decoder.layers)
        for past, present in zip(decoder.past, decoder.present, strict=True)
        if past % layer in names
    ]


def cache_dtype(name: str, names: Mapping[str, str]) -> Any:
    """Return the numpy dtype of one of the cache's inputs.

    Raises:
        LoraportError: If numpy has none for it.
    """
    dtype = FLOATS.get(names[name])
    if dtype is None:
        raise LoraportError(f"input {name}: cannot be fed as {names[name]} from numpy")
    return dtype
