"""What an integer product is as a float, and what its integers were."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.constant_value import Constant
from converters.onnx.graph.constants import constant
from converters.onnx.graph.quantized_values import only_reader


@dataclass(frozen=True)
class ScaledProduct:
    """An integer product as a float.

    Attributes:
        y: The value.
        x_scale: Of the other factor.
        scale: Of the constant factor.
        biased: Something was added in integers.
    """

    y: ir.Value
    x_scale: ir.Value
    scale: Constant
    biased: bool


def scaled_product(node: ir.Node) -> ScaledProduct | None:
    """Return what an integer product is as a float.

    ``node -> Cast -> Mul(x_scale * weight_scale)`` is what quantizers write; ONNX Runtime's first
    ones added a bias in integers before the ``Cast``. Where ``x_scale`` is a constant, the scales
    may have been multiplied already.
    """
    cast = only_reader(node.outputs[0])
    biased = cast is not None and cast.op_type == "Add"
    if cast is not None and biased:
        if cast.inputs[0] is cast.inputs[1]:
            return None
        cast = only_reader(cast.outputs[0])
    if cast is None or cast.op_type != "Cast":
        return None
    scaled = only_reader(cast.outputs[0])
    if scaled is None or scaled.op_type != "Mul":
        return None
    factors = [value for value in scaled.inputs if value is not cast.outputs[0]]
    x_scale = _scale_of(node.inputs[0])
    if len(factors) != 1 or factors[0] is None or x_scale is None:
        return None
    scale = _other_factor(factors[0], x_scale)
    return ScaledProduct(scaled.outputs[0], x_scale, scale, biased) if scale else None


def _scale_of(integers: ir.Value | None) -> ir.Value | None:
    """Return the scale by which numbers were quantized."""
    quantize = integers.producer() if integers is not None else None
    if quantize is None or integers is not quantize.outputs[0]:
        return None
    if quantize.op_type == "DynamicQuantizeLinear":
        return quantize.outputs[1]
    return quantize.inputs[1] if quantize.op_type == "QuantizeLinear" else None


def _other_factor(both: ir.Value, x_scale: ir.Value) -> Constant | None:
    """Return the constant that gave a product with the scale of ``x``."""
    multiply = both.producer()
    if multiply is not None and multiply.op_type == "Mul":
        for first, second in (multiply.inputs, reversed(multiply.inputs)):
            if first is x_scale and (scale := constant(second)) is not None:
                return scale
    product, known = constant(both), constant(x_scale)
    if product is None or known is None:
        return None

    def quotient() -> np.ndarray:
        # In float64, so that a product of two scales gives the other one to its last bit or so.
        wide: np.ndarray = product.array() / known.array().astype(np.float64).reshape(())
        return wide.astype(product.array().dtype)

    return replace(product, array=quotient)
