"""Checkpoints of fp8 weights with a scale for each block, as DeepSeek publishes its models.

The format is that of DeepSeek-V3 (arXiv:2412.19437, 3.3), which transformers calls ``fp8``: a
weight ``W`` is stored as ``W``, e4m3, and ``W_scale_inv``, what its blocks are multiplied by;
blocks of ``weight_block_size``, or the whole weight where that is null.
"""

from __future__ import annotations

import sys
from typing import Any

from converters.merge.quantized import Dequantized, QuantizedCheckpoint
from converters.merge.scaled_codes import FLOAT8, scaled_source
from loraport.errors import LoraportError

_SCALE = "_scale_inv"
_WHOLE = (sys.maxsize, sys.maxsize)


def fp8_weights(quantized: QuantizedCheckpoint) -> Dequantized:
    """Return the weights of a checkpoint whose ``quant_method`` is ``fp8``.

    Raises:
        LoraportError: If its ``weight_block_size`` is none.
    """
    checkpoint, result = quantized.checkpoint, Dequantized()
    block = _block(quantized.settings.get("weight_block_size", [128, 128]))
    for name in checkpoint:
        scale = name + _SCALE
        if name.endswith(_SCALE):
            result.parts.add(name)
            weight = name.removesuffix(_SCALE)
            if weight not in checkpoint:
                result.problems.add(name, f"the weight {weight} that it scales", "none")
        elif name.endswith("activation_scale"):
            result.parts.add(name)  # of the products, which are in float now
        elif scale in checkpoint:
            try:
                source = scaled_source(
                    *(checkpoint, name, scale, [block]), codes=FLOAT8, dtype=quantized.dtype
                )
            except LoraportError as error:
                result.problems.add(name, "a whole fp8 weight", str(error))
                continue
            result.weights[name] = name, source
        elif checkpoint.info(name).dtype in FLOAT8:
            result.problems.add(
                name, f"its scales {scale}", "none", "merge into the float model it was made from"
            )
    return result


def _block(value: Any) -> tuple[int, int]:
    if value is None:
        return _WHOLE
    sizes = value if isinstance(value, list) else []
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise LoraportError(
            "quantization_config of the base: expected weight_block_size to be two positive "
            f"integers, got {value!r}"
        )
    return sizes[0], sizes[1]
