"""Operators that treat every position of ``[batch, sequence, features]`` alike.

They compute the same on ``[rows, features]``, where the positions of all sequences lie end to end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import onnx_ir as ir

Leading = tuple[str, str]


@dataclass(frozen=True, eq=False)
class RowWise:
    """An operator, and which of its values have rows.

    Attributes:
        node: The operator.
        inputs: Numbers of the inputs ``[batch, sequence, features]``.
        outputs: Its outputs of that kind.
        leading: The first two dimensions, the same for all of them.
    """

    node: ir.Node
    inputs: tuple[int, ...]
    outputs: tuple[ir.Value, ...]
    leading: Leading


def row_wise(node: ir.Node) -> RowWise | None:
    """Return an operator as one on rows, or ``None`` if it is none or its shapes are unknown."""
    domain = "" if node.domain == "ai.onnx" else node.domain
    rule = _RULES.get((domain, node.op_type))
    numbers = rule(node) if rule is not None else None
    if numbers is None:
        return None
    outputs = [value for value in node.outputs if value.name and (value.uses() or _ends(value))]
    leading = {leading_of(node.inputs[number]) for number in numbers}
    leading |= {leading_of(value) for value in outputs}
    only = leading.pop() if len(leading) == 1 else None
    if only is None or any(_ends(value) for value in outputs):
        return None
    return RowWise(node, numbers, tuple(outputs), only)


def leading_of(value: ir.Value | None) -> Leading | None:
    """Return the names of the dimensions before the last of three, if all are known."""
    shape = value.shape if value is not None else None
    if shape is None or len(shape) != 3 or not isinstance(shape[2], int):
        return None
    first, second = (dim if isinstance(dim, int) else dim.value for dim in (shape[0], shape[1]))
    return None if first is None or second is None else (str(first), str(second))


def _ends(value: ir.Value) -> bool:
    return value.is_graph_output()


def _rank(value: ir.Value | None) -> int | None:
    return len(value.shape) if value is not None and value.shape is not None else None


def _product(node: ir.Node) -> tuple[int, ...] | None:
    return (0,) if _rank(node.inputs[1]) == 2 else None


def _first(node: ir.Node) -> tuple[int, ...]:
    del node
    return (0,)


def _normalisation(node: ir.Node) -> tuple[int, ...] | None:
    return (0,) if node.attributes.get_int("axis", -1) == -1 else None


def _skip_normalisation(node: ir.Node) -> tuple[int, ...]:
    del node
    return (0, 1)


def _elementwise(node: ir.Node) -> tuple[int, ...] | None:
    """Two values of one shape, or one and a scalar or vector of features."""
    sizes = [value.shape if value is not None else None for value in node.inputs]
    if len(sizes) != 2 or sizes[0] is None or sizes[1] is None:
        return None
    first, second = sizes[0], sizes[1]
    if len(first) == len(second) == 3:
        return (0, 1) if first[2] == second[2] else None
    if len(first) == 3 and len(second) < 2:
        return (0,)
    return (1,) if len(second) == 3 and len(first) < 2 else None


_MICROSOFT = "com.microsoft"
_RULES: Mapping[tuple[str, str], Callable[[ir.Node], tuple[int, ...] | None]] = {
    ("", "MatMul"): _product,
    (_MICROSOFT, "MatMulBnb4"): _first,
    (_MICROSOFT, "MatMulNBits"): _first,
    ("", "LayerNormalization"): _normalisation,
    ("", "RMSNormalization"): _normalisation,
    ("", "SimplifiedLayerNormalization"): _normalisation,
    (_MICROSOFT, "SkipLayerNormalization"): _skip_normalisation,
    (_MICROSOFT, "SkipSimplifiedLayerNormalization"): _skip_normalisation,
    **{("", name): _elementwise for name in ("Add", "Sub", "Mul", "Div")},
    **{
        ("", name): _first
        for name in ("Cast", "Erf", "Gelu", "Identity", "Relu", "Sigmoid", "Softplus", "Tanh")
    },
    **{(_MICROSOFT, name): _first for name in ("FastGelu", "Gelu", "QuickGelu")},
}
