"""bitsandbytes' 8-bit weights, dequantized without bitsandbytes.

The format is LLM.int8's (Dettmers et al. 2022, arXiv:2208.07339): a weight ``X.weight`` is stored
as int8 codes, and ``X.SCB`` has the largest value of each row, which code 127 stands for.
"""

from __future__ import annotations

import sys

from converters.merge.quantized import Dequantized, QuantizedCheckpoint
from converters.merge.scaled_codes import scaled_source
from loraport.errors import LoraportError

_SCALE, _FORMAT = ".SCB", ".weight_format"


def add_int8_weights(quantized: QuantizedCheckpoint, result: Dequantized) -> None:
    """Add a checkpoint's 8-bit weights."""
    checkpoint = quantized.checkpoint
    for name in checkpoint:
        if not name.endswith(_SCALE):
            continue
        module = name.removesuffix(_SCALE)
        weight, layout = f"{module}.weight", module + _FORMAT
        result.parts.update((name, layout))
        try:
            source = scaled_source(
                *(checkpoint, weight, name, [(1, sys.maxsize)]),
                codes=("I8",),
                dtype=quantized.dtype,
                divisor=127,
            )
            if layout in checkpoint and checkpoint.load(layout).any():
                raise LoraportError("expected codes row by row, got an order that a GPU needs")
        except LoraportError as error:
            result.problems.add(weight, "a whole 8-bit weight of bitsandbytes", str(error))
            continue
        result.weights[weight] = weight, source
