"""What modules are called by their biases, which tools that rewrite weights leave as they are.

onnxsim, onnxoptimizer and ONNX Runtime store a weight and its ``Transpose`` as a new constant, and
forget what exporters recorded on operators; ``encoder.layer.0.query.bias`` is still added to the
product, by an operator of its own or by the one that a tool made of both.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from converters.onnx.graph.constants import constant, vector
from converters.onnx.graph.quantized_values import only_reader
from converters.onnx.graph.site import Site
from loraport.naming import is_module_path

_BIAS = ".bias"
# Which inputs of these operators are the bias of another of their inputs.
_ADDING = {
    "Add": (0, 1),
    "BiasGelu": (1,),
    "FastGelu": (1,),
    "SkipLayerNormalization": (4,),
    "SkipSimplifiedLayerNormalization": (3,),
}


def named_by_bias(members: Sequence[Site]) -> str:
    """Return the module whose bias is added to a product, and to no other; else nothing.

    Args:
        members: The places where one weight is used.
    """
    found = [_added(site) for site in members]
    bias = found[0]
    if bias is None or any(other is not bias for other in found):
        return ""
    # Equal biases may be one constant: it says nothing then.
    if len(bias.uses()) > len(members):
        return ""
    known = constant(bias)
    name = known.name if known is not None else ""
    path = name.removesuffix(_BIAS)
    return path if path != name and is_module_path(path) else ""


def _added(site: Site) -> ir.Value | None:
    """Return the constant that is added to a site's product, by its operator or the next one."""
    if site.bias_input is not None:
        return site.node.inputs[site.bias_input]
    reader = only_reader(site.y) if site.expose is None else None
    if reader is None:
        return None
    for number in _ADDING.get(reader.op_type, ()):
        value = reader.inputs[number] if number < len(reader.inputs) else None
        if value is not None and value is not site.y and vector(value, site.out_features):
            return value
    return None
