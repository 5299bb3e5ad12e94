"""Checkpoints of compressed-tensors (llm-compressor, vLLM) whose weights have 8 bits.

A weight ``W`` is stored as ``W``, e4m3 or int8, and ``W_scale``: one scale for the whole weight,
one a row (``channel``), one for some columns of a row (``group``) or one a block. What is packed
into fewer bits, has zero points or was rotated is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

from converters.merge.quantized import Dequantized, QuantizedCheckpoint
from converters.merge.scaled_codes import FLOAT8, scaled_source
from loraport.errors import LoraportError

FORMATS = ("float-quantized", "int-quantized", "naive-quantized")
_SCALE = "_scale"
# Of activations and of the cache, which are in float now.
_LEFT_OUT = ("input_scale", "output_scale", "q_scale", "k_scale", "v_scale")
_UNKNOWN = ("weight_packed", "weight_zero_point", "weight_g_idx", "weight_global_scale")


def compressed_weights(quantized: QuantizedCheckpoint) -> Dequantized:
    """Return the weights of a checkpoint whose ``quant_method`` is ``compressed-tensors``.

    Raises:
        LoraportError: If its weights were rotated.
    """
    checkpoint, result = quantized.checkpoint, Dequantized()
    if quantized.settings.get("transform_config"):
        raise LoraportError(
            f"base {checkpoint.path}: expected weights that are only quantized, got rotated ones "
            "(transform_config); merge into the float model it was made from"
        )
    blocks = list(_blocks(quantized.settings))
    for name in checkpoint:
        scale = name + _SCALE
        leaf = name.rpartition(".")[2]
        if leaf in _LEFT_OUT:
            result.parts.add(name)
        elif leaf in _UNKNOWN:
            result.problems.add(
                name,
                "weights of codes and scales alone",
                "a part that is not handled",
                "merge into the float model it was made from",
            )
        elif leaf == "weight" + _SCALE:
            result.parts.add(name)
            if name.removesuffix(_SCALE) not in checkpoint:
                result.problems.add(name, "the weight that it scales", "none")
        elif leaf == "weight" and scale in checkpoint:
            try:
                source = scaled_source(
                    *(checkpoint, name, scale, blocks),
                    codes=(*FLOAT8, "I8"),
                    dtype=quantized.dtype,
                )
            except LoraportError as error:
                result.problems.add(name, "a whole 8-bit weight", str(error))
                continue
            result.weights[name] = name, source
        elif leaf == "weight" and checkpoint.info(name).dtype in (*FLOAT8, "I8"):
            result.problems.add(name, f"its scales {scale}", "none")
    return result


def _blocks(settings: Mapping[str, Any]) -> Iterator[tuple[int, int]]:
    """Yield the rows and columns of the blocks that the settings name."""
    groups = settings.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue
        sizes = weights.get("block_structure")
        if weights.get("strategy") == "channel":
            yield 1, sys.maxsize
        elif weights.get("strategy") == "group" and _is_size(weights.get("group_size")):
            yield 1, weights["group_size"]
        elif isinstance(sizes, list) and len(sizes) == 2 and all(map(_is_size, sizes)):
            yield sizes[0], sizes[1]


def _is_size(value: Any) -> bool:
    return type(value) is int and value > 0
