"""Each layer of a decoder rotates in the graph as in the model, where kinds of layers differ.

Version 0.18 of GenAI's builder scales the rotations of all kinds as it does those of full
attention.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from converters.onnx.graph.constants import constant
from loraport.errors import LoraportError

_LAYER = re.compile(r"past_key_values\.(\d+)\.key")
_COSINES, _SINES = 7, 8  # inputs of the operator
_POSITIONS = 1024  # compared; float32 angles of later ones differ by their own rounding
_ROUNDING = 1e-2  # of bfloat16, in numbers up to 1


def require_rotations(graph: ir.Model, model: nn.Module) -> None:
    """Refuse a graph that does not rotate as the model does.

    Args:
        graph: The builder's graph.
        model: What it was built from.

    Raises:
        LoraportError: Naming the layers with another rotation, or none that can be told.
    """
    config: Any = model.config
    config = config.get_text_config()
    kinds = getattr(config, "rope_parameters", None) or {}
    if not all(isinstance(settings, dict) for settings in kinds.values()):
        return  # all layers rotate alike
    found = dict(_rotations(graph))
    wanted = {kind: _rotation(model, kind) for kind in set(config.layer_types) if kinds}
    wrong = [
        layer
        for layer, kind in enumerate(config.layer_types if kinds else ())
        if layer not in found or not _alike(found[layer], wanted[kind])
    ]
    if wrong:
        raise LoraportError(
            f"export: expected layers {wrong} to rotate as the model's own do, which differ by "
            "their kind (rope_parameters in its config.json), got another rotation from GenAI's "
            "builder; export it from Python with converters.onnx.export_torch_module"
        )


def _rotations(graph: ir.Model) -> list[tuple[int, np.ndarray]]:
    """Return layer → cosines and sines ``[2, positions, dim / 2]``, where constants say them."""
    found = []
    for node in graph.graph.all_nodes():
        if node.op_type != "GroupQueryAttention" or not node.attributes.get_int("do_rotary", 0):
            continue
        names = [value.name or "" for value in node.inputs if value is not None]
        layer = next((int(m[1]) for name in names if (m := _LAYER.fullmatch(name))), None)
        tables = [constant(node.inputs[number]) for number in (_COSINES, _SINES)]
        if layer is not None and all(table is not None for table in tables):
            arrays = [table.array()[:_POSITIONS] for table in tables if table is not None]
            found.append((layer, np.stack(arrays).astype(np.float32)))
    return found


def _rotation(model: nn.Module, kind: str) -> np.ndarray:
    """Return what the model itself rotates a kind of layers by, as `_rotations` does."""
    rotary = next(m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding"))
    with torch.no_grad():
        tables = rotary(torch.zeros(1), torch.arange(_POSITIONS)[None], kind)
    return np.stack([table[0, :, : table.shape[-1] // 2].float().numpy() for table in tables])


def _alike(got: np.ndarray, wanted: np.ndarray) -> bool:
    wanted = wanted[:, : got.shape[1]]
    return got.shape == wanted.shape and bool(np.abs(got - wanted).max() < _ROUNDING)
