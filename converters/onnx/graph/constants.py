"""Constants of a graph, seen through the operators that only rearrange or round them.

A weight may reach its operator through ``Transpose``, ``Identity``, ``Cast``, ``Reshape`` or
``DequantizeLinear``, maybe rounded by ``QuantizeLinear`` before, or as small integers through
``Cast``, ``Sub`` of a zero point and ``Mul`` by a scale; it may be a part of a constant
(``Split``, ``Slice``, ``Gather``), put together of several (``Concat``), or reshaped by its own
sizes (``Shape``, ``ReduceProd``): shape, type and name are known at once, the values when they are
asked for.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.constant_numbers import COMPUTING, followed
from converters.onnx.graph.constant_shapes import PARTS, SHAPING
from converters.onnx.graph.constant_sizes import SIZES
from converters.onnx.graph.constant_value import Constant
from loraport.errors import LoraportError, first_line

# No exporter writes more operators one after the other, nor scales whose scales are scaled again.
_LONGEST = 64
_DEEPEST = 3
_RULES = SHAPING | COMPUTING
_MAKING = PARTS | SIZES  # values with names of their own
# What impossible shapes, axes and numbers give.
_IMPOSSIBLE = (IndexError, ValueError, TypeError, ZeroDivisionError, StopIteration)


def constant(value: ir.Value | None, depth: int = 0) -> Constant | None:
    """Return a value as a constant, or ``None`` if it is computed from something else.

    Args:
        value: Any value of a graph.
        depth: How many constants it is a scale, a zero point or a shape of.
    """
    passed: list[ir.Value] = []  # from the value back to what is stored
    found: Constant | None = None
    while found is None:
        if value is None or len(passed) > _LONGEST or depth > _DEEPEST:
            return None
        node = value.producer()
        if value.const_value is not None:
            found = _of_tensor(value.name or "", value.const_value)
        elif node is None or node.domain not in ("", "ai.onnx", "com.microsoft"):
            return None
        elif node.op_type == "Constant":
            found = _of_constant_node(node)
            if found is None:
                return None
        elif node.op_type == "Identity":
            value = node.inputs[0]
        elif (node.op_type in _RULES or node.op_type in _MAKING) and node.inputs:
            passed.append(value)
            value = followed(node)
        else:
            return None
    for value in reversed(passed):
        found = _passed(value, found, depth + 1)
        if found is None:
            return None
    return _told(found) if passed else found


def _passed(value: ir.Value, source: Constant, depth: int) -> Constant | None:
    """Return what a rule's operator makes of a constant; ``None`` where it can make nothing."""

    def look(other: ir.Value | None) -> Constant | None:
        return constant(other, depth)

    node = value.producer()
    assert node is not None
    try:
        if node.op_type in _MAKING:
            return _MAKING[node.op_type](node, value, source, look)
        return _RULES[node.op_type](node, source, look)
    except _IMPOSSIBLE:
        return None


def _told(found: Constant) -> Constant:
    """Return a constant that tells why its values cannot be computed, if they cannot."""

    def array() -> np.ndarray:
        try:
            return found.array()
        except _IMPOSSIBLE as error:
            raise LoraportError(
                f"constant {found.name}: expected operators that can compute it, got: "
                f"{first_line(error)}; ONNX Runtime cannot run such a model either"
            ) from error

    return replace(found, array=array)


def vector(value: ir.Value | None, length: int) -> bool:
    """Tell whether a value is a constant ``[length]``."""
    found = constant(value)
    return found is not None and found.shape == (length,)


def _of_tensor(name: str, tensor: ir.TensorProtocol) -> Constant:
    return Constant(name, tuple(tensor.shape.numpy()), tensor.dtype, tensor.numpy)


def _of_constant_node(node: ir.Node) -> Constant | None:
    attribute = node.attributes.get("value")
    if attribute is not None:
        return _of_tensor(node.outputs[0].name or "", attribute.as_tensor())
    for name, dtype in (
        ("value_float", np.float32),
        ("value_floats", np.float32),
        ("value_int", np.int64),
        ("value_ints", np.int64),
    ):
        attribute = node.attributes.get(name)
        if attribute is not None:
            return _of_tensor(
                node.outputs[0].name or "", ir.tensor(np.array(attribute.value, dtype))
            )
    return None
