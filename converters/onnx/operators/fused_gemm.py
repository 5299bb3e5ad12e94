"""``com.microsoft.FusedGemm``: a ``Gemm`` and its activation in one.

ONNX Runtime's optimizer writes it. A slot takes the two apart again.
"""

from __future__ import annotations

from dataclasses import replace

import onnx_ir as ir

from converters.onnx.graph.rewriting import Rewrite
from converters.onnx.graph.site import Site
from converters.onnx.operators import gemm

_ACTIVATION = "activation"
# Standard operators; their own attributes have ``activation_`` before their names here.
_ACTIVATIONS = frozenset(
    (
        "Elu",
        "HardSigmoid",
        "LeakyRelu",
        "Relu",
        "Selu",
        "Sigmoid",
        "Softplus",
        "Softsign",
        "Tanh",
        "ThresholdedRelu",
    )
)


def find_site(node: ir.Node) -> Site | None:
    """Return the site, or ``None`` where ``Gemm`` alone has none or the activation is another."""
    site = gemm.find_site(node)
    activation = node.attributes.get_string(_ACTIVATION, "")
    if site is None or activation not in _ACTIVATIONS:
        return None

    def expose() -> Site:
        rewrite = Rewrite(node)
        own = {name: each for name, each in node.attributes.items() if name.startswith(_ACTIVATION)}
        rest = {name: each for name, each in node.attributes.items() if name not in own}
        (y,) = rewrite.add("Gemm", "Gemm", node.inputs, [site.dtype], rest)
        y.shape = node.outputs[0].shape
        attributes = {
            name.removeprefix(f"{_ACTIVATION}_"): each.value
            for name, each in own.items()
            if name != _ACTIVATION
        }
        rewrite.replace(rewrite.add(activation, activation, [y], [site.dtype], attributes))
        product = y.producer()
        assert product is not None
        return replace(site, node=product, y=y, expose=None)

    return replace(site, y=node.outputs[0], expose=expose)
