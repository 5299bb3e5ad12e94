"""``com.microsoft.MatMulBnb4``: a weight in bitsandbytes' 4-bit floats, a scale per block.

The weight ``[N, K]`` lies flat; ``w = VALUES[code] * absmax[i // block_size]``, two codes a byte,
the first in the high half. ``VALUES`` are NF4's (QLoRA, arXiv:2305.14314) or FP4's. Source: ONNX
Runtime's ContribOperators documentation and ``blockwise_quant_block_bnb4.h``.
"""

from __future__ import annotations

import math

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.constant_value import Constant
from converters.onnx.graph.constants import constant
from converters.onnx.graph.site import Site, inputs_of

_FP4_SIZES = (0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
_FP4 = (*_FP4_SIZES, *(-size for size in _FP4_SIZES))
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_VALUES = {0: _FP4, 1: _NF4}  # by ``quant_type``


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the weight is no constant, not turned as usual or torn."""
    x, packed, absmax = inputs_of(node, 3)
    codes, scales = constant(packed), constant(absmax)
    values = _VALUES.get(node.attributes.get_int("quant_type", 1))
    if x is None or codes is None or scales is None or values is None:
        return None
    if node.attributes.get_int("transB", 1) != 1 or not _fit(node, codes, scales):
        return None
    return Site(
        node=node,
        x=x,
        y=node.outputs[0],
        in_features=node.attributes.get_int("K", 0),
        out_features=node.attributes.get_int("N", 0),
        dtype=scales.dtype,
        weight=lambda: _dequantize(node, codes, scales, values),
        quantized=True,
    )


def _fit(node: ir.Node, codes: Constant, scales: Constant) -> bool:
    """Tell whether there are as many codes and scales as the node says; files may say anything."""
    rows, columns, block = (node.attributes.get_int(key, 0) for key in ("N", "K", "block_size"))
    if min(rows, columns, block) < 1:
        return False
    size = rows * columns
    return math.prod(codes.shape) >= -(-size // 2) and math.prod(scales.shape) >= -(-size // block)


def _dequantize(
    node: ir.Node, codes: Constant, scales: Constant, values: tuple[float, ...]
) -> np.ndarray:
    """Return the node's weight as float32 ``[K, N]``."""
    rows, columns = node.attributes.get_int("N", 0), node.attributes.get_int("K", 0)
    block = node.attributes.get_int("block_size", 0)
    packed = codes.array().ravel()
    spread = np.stack((packed >> 4, packed & 15), axis=1).ravel()[: rows * columns]
    weight = np.array(values, np.float32)[spread]
    weight *= np.repeat(scales.array().astype(np.float32), block)[: rows * columns]
    result: np.ndarray = weight.reshape(rows, columns).T
    return result
