"""``com.microsoft.MatMulNBits``: a block-quantized weight ``[N, K]`` with scales.

``w = (q - zero_point) * scale`` per block of ``block_size`` along ``K``; ``q`` is packed from the
low bits up. Source: ONNX Runtime's ContribOperators documentation.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.site import Site

_WHOLE_IN_A_BYTE = (2, 4, 8)


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the weight is no constant, laid out unusually or torn."""
    x, packed, scales = node.inputs[0], node.inputs[1], node.inputs[2]
    if x is None or packed is None or scales is None:
        return None
    if packed.const_value is None or scales.const_value is None or scales.dtype is None:
        return None
    zero_points = node.inputs[3] if len(node.inputs) > 3 else None
    bias = node.inputs[5] if len(node.inputs) > 5 else None
    permuted = len(node.inputs) > 4 and node.inputs[4] is not None
    if node.attributes.get_int("bits", 4) not in _WHOLE_IN_A_BYTE:
        return None
    if permuted or (zero_points is not None and zero_points.const_value is None):
        return None
    if not _fit(node):
        return None
    return Site(
        node=node,
        x=x,
        y=node.outputs[0],
        in_features=node.attributes.get_int("K", 0),
        out_features=node.attributes.get_int("N", 0),
        dtype=scales.dtype,
        weight=lambda: dequantize(node),
        quantized=True,
        added=5 if bias is not None else None,
    )


def _fit(node: ir.Node) -> bool:
    """Tell whether there are as many numbers as the node says; files may say anything."""
    rows, columns = (node.attributes.get_int(key, 0) for key in ("N", "K"))
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 32)
    if min(rows, columns, block) < 1 or block * bits % 8:
        return False
    blocks = -(-columns // block)
    wanted = [rows * blocks * block * bits // 8, rows * blocks]
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        packed = node.inputs[3].dtype == ir.DataType.UINT8
        wanted.append(rows * -(-blocks * bits // 8) if packed else rows * blocks)
    return wanted == [_size(node, 1 + number) for number in range(len(wanted))]


def _size(node: ir.Node, index: int) -> int:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return math.prod(value.const_value.shape.numpy())


def dequantize(node: ir.Node) -> np.ndarray:
    """Return the node's weight as float32 ``[K, N]``."""
    bits = node.attributes.get_int("bits", 4)
    block = node.attributes.get_int("block_size", 32)
    rows, columns = node.attributes.get_int("N", 0), node.attributes.get_int("K", 0)
    blocks = -(-columns // block)
    packed, scales = _constant(node, 1), _constant(node, 2)
    values = unpack(packed.reshape(rows, -1), bits)[:, : blocks * block]
    if len(node.inputs) > 3 and node.inputs[3] is not None:
        stored = _constant(node, 3)
        integers = stored.dtype == np.uint8
        zeros = unpack(stored.reshape(rows, -1), bits)[:, :blocks] if integers else stored
        zeros = zeros.reshape(rows, blocks, 1).astype(np.float32)
    else:
        zeros = np.full((rows, blocks, 1), float(1 << (bits - 1)), np.float32)
    scaled = values.reshape(rows, blocks, block).astype(np.float32) - zeros
    scaled *= scales.reshape(rows, blocks, 1).astype(np.float32)
    weight: np.ndarray = scaled.reshape(rows, blocks * block)[:, :columns].T
    return weight


def _constant(node: ir.Node, index: int) -> np.ndarray:
    value = node.inputs[index]
    assert value is not None
    assert value.const_value is not None
    return value.const_value.numpy()


def unpack(packed: np.ndarray, bits: int) -> np.ndarray:
    """Return the ``bits``-wide numbers of each row of bytes, low bits first."""
    if bits == 8:
        return packed
    spread = np.empty((*packed.shape, 8 // bits), np.uint8)
    for place in range(8 // bits):  # seven times as fast as shifts of an axis this short
        np.bitwise_and(packed >> (place * bits), (1 << bits) - 1, out=spread[..., place])
    return spread.reshape(packed.shape[0], -1)
