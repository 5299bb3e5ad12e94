"""What a merge changes in ``config.json``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from converters.merge.layout import BaseLayout
from loraport.errors import Problems

_NESTED = ("text_config", "llm_config", "decoder")


def config_after(
    config: Mapping[str, Any],
    layout: BaseLayout,
    *,
    untied: bool,
    resized: Mapping[str, tuple[int, ...]],
    dequantized: bool,
    problems: Problems,
) -> dict[str, Any] | None:
    """Return the merged model's ``config.json``, or ``None`` where nothing changes.

    Args:
        config: The base's.
        layout: The base's.
        untied: Two parameters that were one tensor are two now.
        resized: Parameters of a new size, or new altogether, and their shapes.
        dequantized: The base was quantized and the output is not.
        problems: Takes what cannot be said in a configuration.
    """
    changed: dict[str, Any] = copy.deepcopy(dict(config))
    if untied:
        changed["tie_word_embeddings"] = False
        for nested in _nested(changed):
            if "tie_word_embeddings" in nested:
                nested["tie_word_embeddings"] = False
    if dequantized:
        changed.pop("quantization_config", None)
    vocabulary = {
        shape[0]
        for name, shape in resized.items()
        if name in layout.embeddings and layout.shapes.get(name) != shape
    }
    if vocabulary:
        _set_vocabulary(changed, layout, resized, vocabulary, problems)
    heads = {name: shape for name, shape in resized.items() if name not in layout.embeddings}
    if heads:
        _set_head(changed, layout, heads, problems)
    return changed if changed != config else None


def _nested(config: dict[str, Any]) -> list[dict[str, Any]]:
    return [config[key] for key in _NESTED if isinstance(config.get(key), dict)]


def _set_vocabulary(
    config: dict[str, Any],
    layout: BaseLayout,
    resized: Mapping[str, tuple[int, ...]],
    sizes: set[int],
    problems: Problems,
) -> None:
    tied = {name for group in layout.tied for name in group if set(group) & resized.keys()}
    left = sorted(layout.embeddings - resized.keys() - tied)
    for name in left:
        problems.add(
            name,
            f"it resized to {max(sizes)} rows too",
            f"{list(layout.shapes[name])}",
            "resize the base's vocabulary and save it, then merge into that",
        )
    if len(sizes) > 1:
        problems.add("vocabulary", "one size", f"{sorted(sizes)}")
    for settings in [config, *_nested(config)]:
        if "vocab_size" in settings:
            settings["vocab_size"] = max(sizes)


def _set_head(
    config: dict[str, Any],
    layout: BaseLayout,
    heads: Mapping[str, tuple[int, ...]],
    problems: Problems,
) -> None:
    labels = {
        shape[0]
        for name, shape in heads.items()
        if layout.shapes.get(name) != shape and len(shape) > 0
    }
    architecture = layout.model_class or ""
    config["architectures"] = [architecture]
    if not labels:
        return
    if len(labels) > 1 or not architecture.endswith("Classification"):
        for name, shape in heads.items():
            problems.add(
                name,
                f"{list(layout.shapes.get(name, ()))}, its shape in {architecture}",
                f"{list(shape)}",
                "use the base the adapter was trained on",
            )
        return
    number = labels.pop()
    config["id2label"] = {str(index): f"LABEL_{index}" for index in range(number)}
    config["label2id"] = {f"LABEL_{index}": index for index in range(number)}
    config.pop("num_labels", None)
