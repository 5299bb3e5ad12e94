"""``com.microsoft.FusedConv``: a ``Conv``, what is added to it and its activation in one.

ONNX Runtime's optimizer writes it. A slot takes the three apart again.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.rewriting import Rewrite, opset_of
from converters.onnx.graph.site import Site, inputs_of
from converters.onnx.operators import conv

_OWN = ("activation", "activation_params")
# Activation → what the numbers of ``activation_params`` are.
_ACTIVATIONS: dict[str, tuple[str, ...]] = {
    "": (),
    "Relu": (),
    "Sigmoid": (),
    "Tanh": (),
    "LeakyRelu": ("alpha",),
    "HardSigmoid": ("alpha", "beta"),
    "Clip": ("min", "max"),
}
_BOUNDS_ARE_INPUTS = 11  # of Clip, from this opset on


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where ``Conv`` alone has none or the activation is another."""
    site = conv.find_site(node)
    activation, parameters = _activation(node)
    if site is None or len(_ACTIVATIONS.get(activation, ("unknown",))) != len(parameters):
        return None

    def expose() -> Site:
        rewrite = Rewrite(node)
        x, kernel, bias, added = inputs_of(node, 4)
        inputs = [x, kernel] if bias is None else [x, kernel, bias]
        attributes = {name: each for name, each in node.attributes.items() if name not in _OWN}
        (y,) = rewrite.add("Conv", "Conv", inputs, [site.dtype], attributes)
        y.shape = node.outputs[0].shape
        following = y
        if added is not None:
            (following,) = rewrite.add("Add", "Add", [y, added], [site.dtype])
        rewrite.replace([_activated(rewrite, following, activation, parameters, site.dtype)])
        convolution = y.producer()
        assert convolution is not None
        return replace(site, node=convolution, y=y, expose=None)

    return replace(site, y=node.outputs[0], expose=expose)


def _activation(node: ir.Node) -> tuple[str, list[float]]:
    name, parameters = (node.attributes.get(each) for each in _OWN)
    return (
        name.as_string() if name is not None else "",
        list(parameters.as_floats()) if parameters is not None else [],
    )


def _activated(
    rewrite: Rewrite, value: ir.Value, name: str, parameters: list[float], dtype: ir.DataType
) -> ir.Value:
    if name == "Clip" and opset_of(rewrite.node) >= _BOUNDS_ARE_INPUTS:
        bounds = [
            rewrite.constant(f"Clip/{role}", np.array(bound, dtype.numpy()))
            for role, bound in zip(_ACTIVATIONS[name], parameters, strict=True)
        ]
        return rewrite.add("Clip", "Clip", [value, *bounds], [dtype])[0]
    if not name:
        return value
    attributes = dict(zip(_ACTIVATIONS[name], parameters, strict=True))
    return rewrite.add(name, name, [value], [dtype], attributes)[0]
