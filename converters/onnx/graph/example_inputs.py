"""Inputs for a graph that came without any: valid, small, always the same.

Types, shapes and names decide: token numbers stay below the vocabulary they are looked up in,
masks are ones, caches are empty, lengths are the sequence's, everything else is random. What
searches for a continuation (``BeamSearch``) may write some tokens, in one way, without a penalty.
A name is of one size wherever it stands, first or behind others.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.constants import constant

# Tried in this order, until the graph takes one.
_BATCHES_AND_SIZES = ((2, 8), (1, 8), (2, 16), (1, 32), (1, 64), (1, 224), (1, 512), (1, 576))
_PASS_ON = ("Cast", "Identity", "Unsqueeze", "Squeeze", "Reshape", "Flatten", "Expand", "Slice")
_SAMPLE_RATE = 16000
_UNKNOWN_VOCABULARY = 2
_WRITTEN = 4


@dataclass(frozen=True)
class _Sizes:
    batch: int
    size: int
    inner: frozenset[str]  # names of dimensions that stand behind others, and are no batch
    layers_first: bool = False  # a number that stands first is no batch, but what is behind it


def example_inputs(model: ir.Model) -> Iterator[dict[str, np.ndarray]]:
    """Yield inputs for a graph, of one size after the other.

    Args:
        model: A graph as it was before slots went in.
    """
    wanted = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
    named = {_name(dim) for value in wanted for dim in (value.shape or ())[1:]}
    inner = frozenset(name for name in named if name and "batch" not in name)
    states = any(_may_be_state(value) for value in wanted)
    for layers_first in (False, True) if states else (False,):
        for batch, size in _BATCHES_AND_SIZES:
            random = np.random.default_rng(0)
            sizes = _Sizes(batch, size, inner, layers_first)
            yield {value.name or "": _array(value, sizes, random) for value in wanted}


def _may_be_state(value: ir.Value) -> bool:
    """Tell whether a value may be a recurrent layer's: ``[layers, batch, features]``, no names."""
    dimensions = list(value.shape) if value.shape is not None else []
    numbers = [isinstance(entry, int) for entry in dimensions]
    return numbers == [True, False, True] and not _name(dimensions[1])


def _array(value: ir.Value, sizes: _Sizes, random: np.random.Generator) -> np.ndarray:
    name = (value.name or "").lower()
    dimensions = value.shape if value.shape is not None else ()
    shape = [_dimension(axis, entry, sizes) for axis, entry in enumerate(dimensions)]
    if sizes.layers_first and _may_be_state(value):
        shape[1] = sizes.batch
    dtype = (value.dtype or ir.DataType.FLOAT).numpy()
    if "mask" in name or "penalty" in name or name.startswith("num_") or dtype == np.bool_:
        return np.ones(shape, dtype)
    if dtype.kind not in "iu":
        return random.standard_normal(shape).astype(dtype)
    if "token_type" in name or "segment" in name:
        return np.zeros(shape, dtype)
    if "position" in name:
        last = shape[-1] if shape else 1
        return np.broadcast_to(np.arange(last), shape).astype(dtype)
    if name == "max_length":
        return np.full(shape, sizes.size + _WRITTEN, dtype)
    if "length" in name or name.endswith("_len"):
        return np.full(shape, sizes.size, dtype)
    if name in ("sr", "sample_rate", "sampling_rate"):
        return np.full(shape, _SAMPLE_RATE, dtype)
    vocabulary = min(_vocabularies(value), default=_UNKNOWN_VOCABULARY)
    return random.integers(0, vocabulary, shape).astype(dtype)


def _dimension(axis: int, entry: object, sizes: _Sizes) -> int:
    if isinstance(entry, int) and entry > 0:
        return entry
    name = _name(entry)
    if "past" in name and "+" not in name:
        return 0
    if (axis == 0 and name not in sizes.inner) or "batch" in name:
        return sizes.batch
    return sizes.size


def _name(entry: object) -> str:
    """Return what a dimension is called, which is empty where it has no name."""
    return str(getattr(entry, "value", entry) or "").lower()


def _vocabularies(value: ir.Value) -> Iterator[int]:
    """Yield the number of rows of every table that a value's numbers are looked up in."""
    left, seen = [value], {id(value)}
    while left:
        for node, index in left.pop().uses():
            if node.op_type in ("Gather", "GatherBlockQuantized", "EmbedLayerNormalization"):
                tables = node.inputs[2:3] if node.op_type.startswith("Embed") else node.inputs[:1]
                found = constant(tables[0]) if tables and index in (0, 1) else None
                if found is not None and found.shape:
                    yield found.shape[0]
            elif node.op_type in _PASS_ON and index == 0 and id(node.outputs[0]) not in seen:
                seen.add(id(node.outputs[0]))
                left.append(node.outputs[0])
