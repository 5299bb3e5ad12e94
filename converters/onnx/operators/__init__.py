"""The operators that can carry a slot: one file each, with one function ``find_site(node)``.

Adding an operator is adding its file and its line in `OPERATORS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import onnx_ir as ir

from converters.onnx.graph.site import Site, gives_only_its_shape
from converters.onnx.operators import (
    attention,
    conv,
    conv_integer,
    dynamic_quantize_matmul,
    einsum,
    fused_conv,
    fused_gemm,
    fused_matmul,
    gather,
    gather_block_quantized,
    gemm,
    matmul,
    matmul_bnb4,
    matmul_integer,
    matmul_integer_to_float,
    matmul_nbits,
    q_attention,
    q_gemm,
    qlinear_conv,
    qlinear_matmul,
)

OPERATORS: Mapping[tuple[str, str], Callable[[ir.Node], Site | None]] = {
    ("", "Conv"): conv.find_site,
    ("", "ConvInteger"): conv_integer.find_site,
    ("", "Einsum"): einsum.find_site,
    ("", "Gather"): gather.find_site,
    ("", "Gemm"): gemm.find_site,
    ("", "MatMul"): matmul.find_site,
    ("", "MatMulInteger"): matmul_integer.find_site,
    ("", "QLinearConv"): qlinear_conv.find_site,
    ("", "QLinearMatMul"): qlinear_matmul.find_site,
    ("com.microsoft", "Attention"): attention.find_site,
    ("com.microsoft", "DynamicQuantizeMatMul"): dynamic_quantize_matmul.find_site,
    ("com.microsoft", "FusedConv"): fused_conv.find_site,
    ("com.microsoft", "FusedGemm"): fused_gemm.find_site,
    ("com.microsoft", "FusedMatMul"): fused_matmul.find_site,
    ("com.microsoft", "GatherBlockQuantized"): gather_block_quantized.find_site,
    ("com.microsoft", "MatMulBnb4"): matmul_bnb4.find_site,
    ("com.microsoft", "MatMulIntegerToFloat"): matmul_integer_to_float.find_site,
    ("com.microsoft", "MatMulNBits"): matmul_nbits.find_site,
    ("com.microsoft", "QAttention"): q_attention.find_site,
    ("com.microsoft", "QGemm"): q_gemm.find_site,
    ("com.microsoft", "QLinearConv"): qlinear_conv.find_site,
}


def find_site(node: ir.Node) -> Site | None:
    """Return the site a node offers, or ``None`` if a slot cannot be there or would do nothing."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    operator = OPERATORS.get((domain, node.op_type))
    site = operator(node) if operator else None
    if site is None or 0 in (site.fan_in, site.out_features):
        return None
    return None if gives_only_its_shape(node.outputs[0]) else site
