"""How far back each layer of a decoder looks, in the graph as in the model.

Version 0.18 of GenAI's builder writes no window where all layers have one (Mistral, Phi-3), so the
graph would look back further than the model does once a text is longer.
"""

from __future__ import annotations

import re
from typing import Any

import onnx_ir as ir

from loraport.base.attention_windows import attention_windows
from loraport.errors import LoraportError

_WINDOW = "local_window_size"
_LAYER = re.compile(r"past_key_values\.(\d+)\.key")


def set_attention_windows(model: ir.Model, config: Any) -> None:
    """Give each ``GroupQueryAttention`` the window of its layer, in place.

    Args:
        model: The builder's graph.
        config: The transformers configuration of what it was built from.

    Raises:
        LoraportError: If a layer has a window and the graph no operator that takes it.
    """
    windows = attention_windows(config)
    found = {}
    for node in model.graph.all_nodes():
        if node.op_type != "GroupQueryAttention":
            continue
        names = [value.name or "" for value in node.inputs if value is not None]
        layer = next((int(m[1]) for name in names if (m := _LAYER.fullmatch(name))), None)
        if layer is not None and layer < len(windows):
            node.attributes[_WINDOW] = ir.AttrInt64(_WINDOW, windows[layer])
            found[layer] = windows[layer]
    missing = [i for i, window in enumerate(windows) if window > 0 and i not in found]
    if missing:
        raise LoraportError(
            f"export: expected attention that can look back {max(windows)} tokens only, as layers "
            f"{missing} of the model do, got a graph without; export to another precision or "
            "provider"
        )
