"""``com.microsoft.GatherBlockQuantized``: rows of a block-quantized embedding.

``w = (q - zero_point) * scale`` per block along the last axis; numbers below a byte are packed
from the low bits up in ``uint8``, or of a type of their own. Without zero points, packed numbers
are centred at half their range and others at zero. Source: ONNX Runtime's ContribOperators
documentation.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.constant_value import Constant
from converters.onnx.graph.constants import constant
from converters.onnx.graph.site import Site, inputs_of
from converters.onnx.operators.matmul_nbits import unpack
from loraport.adapter import ModuleKind

_PACKED = ir.DataType.UINT8
_WIDTHS = (2, 4, 8)


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where it gathers no rows of a constant matrix, or is torn."""
    data, tokens, scales, zeros = inputs_of(node, 4)
    table, scale, zero = constant(data), constant(scales), constant(zeros)
    if tokens is None or table is None or scale is None or len(table.shape) != 2:
        return None
    if (zeros is not None and zero is None) or constant(tokens) is not None:
        return None
    if node.attributes.get_int("gather_axis", 0) not in (0, -2):
        return None
    if node.attributes.get_int("quantize_axis", 1) not in (1, -1):
        return None
    bits = node.attributes.get_int("bits", 4)
    block = node.attributes.get_int("block_size", 128)
    if table.dtype.is_floating_point() or block < 1 or bits not in _WIDTHS:
        return None
    rows, stored = table.shape
    in_a_byte = 8 // bits if table.dtype == _PACKED else 1
    columns = stored * in_a_byte
    blocks = -(-columns // block)
    if scale.shape != (rows, blocks):
        return None
    if zero is not None and zero.shape != (rows, -(-blocks // in_a_byte)):
        return None
    return Site(
        node=node,
        x=tokens,
        y=node.outputs[0],
        in_features=rows,
        out_features=columns,
        dtype=scale.dtype,
        weight=lambda: _dequantize(table, scale, zero, bits, block),
        quantized=True,
        kind=ModuleKind.EMBEDDING,
    )


def _dequantize(
    table: Constant, scale: Constant, zero: Constant | None, bits: int, block: int
) -> np.ndarray:
    """Return the table as ``[vocabulary, features]``."""
    packed = table.dtype == _PACKED
    values = unpack(table.array(), bits) if packed else table.array()
    columns = values.shape[1]
    centred = values.astype(np.float32)
    if zero is not None:
        zeros = unpack(zero.array(), bits) if packed else zero.array()
        zeros = zeros[:, : scale.shape[1]].astype(np.float32)
        centred -= np.repeat(zeros, block, 1)[:, :columns]
    elif packed:
        centred -= float(1 << (bits - 1))
    scales = np.repeat(scale.array().astype(np.float32), block, 1)[:, :columns]
    result: np.ndarray = (centred * scales).astype(scale.array().dtype)
    return result
