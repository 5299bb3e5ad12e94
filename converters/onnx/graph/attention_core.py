"""What is left of a fused attention when its projection is taken out of it.

``Attention(x, W, b, ...)`` computes ``softmax(q k^T) v`` with ``q k v = x W + b``. Here ``x W``
becomes an operator of its own, which can have a slot, and the rest ``MultiHeadAttention`` with
the same heads, mask and cache. Source: ONNX Runtime's ContribOperators documentation.

ONNX Runtime's CPU kernels give the same bits for both, but where no mask, cache or bias on the
scores is given: then ``MultiHeadAttention`` takes its own shortcut, 1e-6 away.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from converters.onnx.graph.constants import constant
from converters.onnx.graph.rewriting import Rewrite

_DOMAIN = "com.microsoft"
_KEPT = ("num_heads", "unidirectional", "mask_filter_value", "scale")
# Masks that both operators read alike: lengths [batch], [batch, total], [batch, sequence, total].
_MASK_RANKS = (1, 2, 3)
_GIVE_LENGTHS = ("EmbedLayerNormalization", "QEmbedLayerNormalization")
_SAME_RANK = ("Cast", "Identity")
_LAST = ([1], [-1])  # axis of a mask [batch, total]


@dataclass(frozen=True)
class AttentionInputs:
    """A fused attention's inputs but for ``x`` and its weight.

    Attributes:
        bias: Of the projection.
        mask: Its mask, or lengths.
        past: Cache of keys and values ``[2, batch, heads, past, size]``.
        scores_bias: Added to ``q k^T``.
    """

    bias: ir.Value | None
    mask: ir.Value | None
    past: ir.Value | None
    scores_bias: ir.Value | None


def can_be_taken_apart(node: ir.Node, mask: ir.Value | None) -> bool:
    """Tell whether ``MultiHeadAttention`` can do what is left of a fused attention."""
    if any(node.attributes.get_int(name, 0) for name in ("do_rotary", "past_present_share_buffer")):
        return False
    if node.attributes.get_int("num_heads", 0) <= 0:
        return False
    return mask is None or _mask_is_read_alike(mask)


def hidden_sizes(node: ir.Node, columns: int) -> list[int]:
    """Return the widths of queries, keys and values."""
    given = node.attributes.get("qkv_hidden_sizes")
    sizes = [int(size) for size in given.as_ints()] if given is not None else []
    return sizes if any(sizes) else [columns // 3] * 3


def take_apart(
    rewrite: Rewrite,
    node: ir.Node,
    projected: ir.Value,
    sizes: list[int],
    inputs: AttentionInputs,
    dtype: ir.DataType,
) -> None:
    """Replace a fused attention by one of projected values.

    Args:
        rewrite: Its place, with the operators that gave ``projected``.
        node: The fused attention; is removed.
        projected: ``x W``, ``[batch, sequence, q + k + v]``, without bias.
        sizes: Widths of queries, keys and values.
        inputs: The other inputs.
        dtype: Element type.
    """
    parts = rewrite.split("split", projected, sizes, 2, dtype)
    cache: list[ir.Value | None] = [None, None]
    if inputs.past is not None:
        cache = [
            rewrite.entry(f"past_{name}", inputs.past, index, dtype)
            for index, name in enumerate(("key", "value"))
        ]
    wants_present = len(node.outputs) > 1 and bool(node.outputs[1].name)
    arguments = [*parts, inputs.bias, inputs.mask, inputs.scores_bias, *cache]
    while arguments[-1] is None:
        arguments.pop()
    made = rewrite.add(
        "attention",
        "MultiHeadAttention",
        arguments,
        [dtype] * (3 if wants_present else 1),
        {name: found.value for name in _KEPT if (found := node.attributes.get(name)) is not None},
        domain=_DOMAIN,
    )
    outputs: list[ir.Value | None] = [made[0], *[None] * (len(node.outputs) - 1)]
    if wants_present:
        apart = [
            rewrite.unsqueeze(f"present_{name}", value, 0, dtype)
            for name, value in zip(("key", "value"), made[1:], strict=True)
        ]
        outputs[1] = rewrite.add("present", "Concat", apart, [dtype], {"axis": 0})[0]
    rewrite.replace(outputs)


def _mask_is_read_alike(mask: ir.Value) -> bool:
    """Tell whether a mask has a shape that means the same to both operators.

    ``[2 * batch]``, ends and starts, is for the fused one only; it is made by ``Concat``.
    """
    source: ir.Value | None = mask
    while source is not None:
        known = constant(source)
        rank = len(known.shape) if known is not None else _rank(source)
        producer = source.producer()
        if rank is not None:
            joined = rank == 1 and (producer is None or producer.op_type == "Concat")
            return rank in _MASK_RANKS and not joined
        if producer is not None and (producer.op_type in _GIVE_LENGTHS or _counts(producer)):
            return True
        if producer is None or producer.op_type not in _SAME_RANK:
            return False
        source = producer.inputs[0]
    return False


def _counts(node: ir.Node) -> bool:
    """Tell whether an operator sums up ``[batch, total]`` to lengths ``[batch]``.

    So ONNX Runtime's optimizer makes them of a mask, where no embedding is fused that gives them.
    """
    if node.op_type != "ReduceSum" or node.attributes.get_int("keepdims", 1) != 0:
        return False
    mask = node.inputs[0]
    while mask is not None and _rank(mask) is None:
        maker = mask.producer()
        mask = maker.inputs[0] if maker is not None and maker.op_type in _SAME_RANK else None
    return mask is not None and _rank(mask) == 2 and _axes(node) in _LAST


def _axes(node: ir.Node) -> list[int] | None:
    """Return the axes that are summed over, an input since opset 13."""
    if (given := node.attributes.get("axes")) is not None:
        return list(given.as_ints())
    known = constant(node.inputs[1]) if len(node.inputs) > 1 else None
    return None if known is None else [int(axis) for axis in known.array().ravel()]


def _rank(value: ir.Value) -> int | None:
    return None if value.shape is None else len(value.shape)
