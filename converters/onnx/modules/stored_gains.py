"""What a graph holds for a norm's weight: the weight itself, or one more (see `gains_plus_one`).

Nothing in the graph tells. ONNX Runtime GenAI's builder stores the sum for the decoders whose
norms multiply by ``1 + weight``, and says in the configuration that it writes beside the graph
which decoder it is; graphs of other exporters add the one themselves.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import onnx_ir as ir

from loraport.runtime.decoder import GENAI_CONFIG

_BUILDER = "onnxruntime-genai"  # as it calls itself
# Gemma 4 multiplies by the weight itself.
_PLUS_ONE = re.compile(r"gemma([23](_.*)?)?|nemotron|qwen3_5(_.*)?")
# Operators that normalize, and which of their inputs they multiply by.
NORMS = {
    "LayerNormalization": (1,),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "SkipLayerNormalization": (2,),
    "SkipSimplifiedLayerNormalization": (2,),
}
_GAINS = {
    **NORMS,
    "GroupQueryAttention": (14, 15),  # queries and keys, in graphs for GPUs
    "PagedAttention": (12, 13),
}


def adds_to_gains(kind: str) -> bool:
    """Tell whether the builder adds one to the norms' weights of a kind of decoder."""
    return _PLUS_ONE.fullmatch(kind) is not None


def added_to_gains(model: ir.Model, directory: Path) -> int | None:
    """Return what a graph's norms have added to their weights: 0 or 1; ``None`` if nothing tells.

    Args:
        model: The graph.
        directory: Where its file lies.
    """
    try:
        kind = json.loads((directory / GENAI_CONFIG).read_text("utf-8"))["model"]["type"]
    except (OSError, ValueError, LookupError, TypeError):
        kind = None
    if isinstance(kind, str):
        return int(adds_to_gains(kind))
    return None if model.producer_name == _BUILDER else 0


def is_gain(value: ir.Value) -> bool:
    """Tell whether a constant vector is what a norm multiplies by."""
    shape = value.shape
    if shape is None or len(shape) != 1:
        return False
    return any(use.idx in _GAINS.get(use.node.op_type, ()) for use in value.uses())
