"""``Einsum`` that is a product with a constant matrix: ``bsi,io->bso`` or ``...i,oi->...o``."""

from __future__ import annotations

import onnx_ir as ir

from converters.onnx.graph.constants import constant
from converters.onnx.graph.matrix_site import matrix_site
from converters.onnx.graph.quantized_values import rounded, unrounded
from converters.onnx.graph.site import Site

_ELLIPSIS = "..."


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where the equation is more than ``[..., in]`` by a matrix.

    The weight is either factor, either way round.
    """
    if len(node.inputs) != 2:
        return None
    terms = _terms(node.attributes.get_string("equation", ""))
    known = [constant(value) for value in node.inputs]
    if terms is None or (known[0] is None) == (known[1] is None):
        return None
    place = 0 if known[0] is not None else 1
    x, weight = node.inputs[1 - place], known[place]
    transposed = _stored_out_in(terms[1 - place], terms[place], terms[2])
    if x is None or weight is None or transposed is None:
        return None
    if len(weight.shape) != 2 or not weight.dtype.is_floating_point():
        return None
    return matrix_site(node, unrounded(x), rounded(node.outputs[0]), weight, transposed=transposed)


def _terms(equation: str) -> tuple[str, str, str] | None:
    """Return the two factors' letters and the result's; ``None`` for another kind of equation."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    factors = left.split(",")
    return (factors[0], factors[1], result) if arrow and len(factors) == 2 else None


def _stored_out_in(x: str, weight: str, result: str) -> bool | None:
    """Tell whether the weight lies ``[out, in]``; ``None`` if this is no such product."""
    leading = x[:-1]
    letters = leading.replace(_ELLIPSIS, "", 1)
    if len(weight) != 2 or (not letters.isalpha() and letters):
        return None
    for transposed in (False, True):
        features, outputs = weight[transposed], weight[not transposed]
        if (
            (x[-1:], result) == (features, leading + outputs)
            and len({*letters, features, outputs}) == len(letters) + 2
            and leading.startswith(_ELLIPSIS) == (_ELLIPSIS in leading)
        ):
            return transposed
    return None
