"""``Einsum`` that is a product with a constant matrix: ``bsi,io->bso`` or ``...i,oi->...o``.

So is one whose features or outputs are several axes, such as the heads of ``bsi,ihd->bshd`` and
``bshd,hdo->bso``. There a slot makes a ``MatMul`` of it, between what flattens those axes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.constant_value import Constant
from converters.onnx.graph.constants import constant
from converters.onnx.graph.matrix_site import matrix_site
from converters.onnx.graph.quantized_values import rounded, unrounded
from converters.onnx.graph.rewriting import Rewrite
from converters.onnx.graph.site import Site

_ELLIPSIS = "..."


@dataclass(frozen=True)
class _Product:
    """The equation ``leading features, features outputs -> leading outputs``.

    Attributes:
        leading: Letters of what the rows are, perhaps after an ellipsis.
        features: Of what is summed up.
        outputs: Of what the weight makes of it.
        transposed: The weight has its outputs first.
    """

    leading: str
    features: str
    outputs: str
    transposed: bool

    @property
    def of_a_matrix(self) -> bool:
        """Whether features and outputs are one axis each."""
        return len(self.features) == len(self.outputs) == 1


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the equation is more than rows by a matrix.

    The weight is either factor, either way round.
    """
    if len(node.inputs) != 2:
        return None
    terms = _terms(node.attributes.get_string("equation", ""))
    known = [constant(value) for value in node.inputs]
    if terms is None or (known[0] is None) == (known[1] is None):
        return None
    place = 0 if known[0] is not None else 1
    x, stored, weight = node.inputs[1 - place], node.inputs[place], known[place]
    product = _product(terms[1 - place], terms[place], terms[2])
    if x is None or stored is None or weight is None or product is None:
        return None
    if len(weight.shape) != len(terms[place]) or not weight.dtype.is_floating_point():
        return None
    if product.of_a_matrix:
        transposed = product.transposed
        y = rounded(node.outputs[0])
        return matrix_site(node, unrounded(x), y, weight, transposed=transposed)
    # How many axes an ellipsis stands for is not known, so what is flat could not unfold again.
    return None if _ELLIPSIS in product.leading else _of_axes(node, x, stored, weight, product)


def sums_constant(node: ir.Node) -> bool:
    """Tell whether an ``Einsum`` adds up what a constant weighs, as a product does."""
    terms = _terms(node.attributes.get_string("equation", "")) if node.op_type == "Einsum" else None
    if terms is None or len(node.inputs) != 2:
        return False
    return any(
        constant(value) is not None and bool(set(term) - set(terms[2]) - set(_ELLIPSIS))
        for value, term in zip(node.inputs, terms, strict=False)
    )


def _of_axes(
    node: ir.Node, x: ir.Value, stored: ir.Value, weight: Constant, product: _Product
) -> Site:
    first = len(product.outputs) if product.transposed else len(product.features)
    sizes = (weight.shape[:first], weight.shape[first:])
    inputs, outputs = reversed(sizes) if product.transposed else sizes
    flat = tuple(map(math.prod, sizes))
    matrix = replace(weight, shape=flat, array=lambda: weight.array().reshape(flat))
    rows = len(product.leading)

    def expose() -> Site:
        rewrite = Rewrite(node)

        def reshaped(name: str, value: ir.Value, shape: list[int]) -> ir.Value:
            wanted = rewrite.constant(f"{name}/shape", np.array(shape, np.int64))
            return rewrite.add(name, "Reshape", [value, wanted], [weight.dtype])[0]

        same = [0] * rows  # as in the input
        taken = x if len(inputs) == 1 else reshaped("features", x, [*same, math.prod(inputs)])
        factor = reshaped("weight", stored, list(flat))
        if product.transposed:
            turn = {"perm": [1, 0]}
            factor = rewrite.add("turned", "Transpose", [factor], [weight.dtype], turn)[0]
        y = rewrite.add("MatMul", "MatMul", [taken, factor], [weight.dtype])[0]
        for value, size in ((taken, math.prod(inputs)), (y, math.prod(outputs))):
            if x.shape is not None:
                value.shape = ir.Shape([*x.shape[:rows], size])
        whole = y if len(outputs) == 1 else reshaped("outputs", y, [*same, *outputs])
        rewrite.replace([whole])
        made = y.producer()
        assert made is not None
        return replace(site, node=made, x=taken, y=y, expose=None)

    site = matrix_site(node, x, node.outputs[0], matrix, transposed=product.transposed)
    site = replace(site, expose=expose)
    return site


def _terms(equation: str) -> tuple[str, str, str] | None:
    """Return the two factors' letters and the result's; ``None`` for another kind of equation."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    factors = left.split(",")
    return (factors[0], factors[1], result) if arrow and len(factors) == 2 else None


def _product(x: str, weight: str, result: str) -> _Product | None:
    """Return the equation as a product of rows; ``None`` if it is another."""
    features = "".join(letter for letter in x if letter in weight)
    leading = x[: len(x) - len(features)]
    outputs = result.removeprefix(leading)
    orders = (features + outputs, outputs + features)
    letters = leading.removeprefix(_ELLIPSIS) + features + outputs
    if (
        not (features and outputs and letters.isalpha())
        or (leading + features, leading + outputs) != (x, result)
        or len(set(letters)) != len(letters)
        or weight not in orders
    ):
        return None
    return _Product(leading, features, outputs, transposed=weight == orders[1])
