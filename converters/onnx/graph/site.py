"""A place in a graph where a slot can go."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.constants import vector
from loraport.adapter import ModuleKind

_MEASURING = frozenset(("Shape", "Size"))


@dataclass(frozen=True, eq=False)
class Site:
    """An operator ``y = alpha * x W (+ bias)`` with a constant weight.

    Attributes:
        node: The operator.
        x: Its input: activations ``[..., in]``, of a convolution ``[batch, in, *size]``, of an
            embedding token numbers.
        y: Its output ``[..., out]``, of a convolution ``[batch, out, *size]``.
        in_features: Features of ``x``: channels of a convolution, vocabulary of an embedding.
        out_features: Features of ``y``.
        dtype: Element type of the output, and so of the slot.
        weight: Gives the weight as ``[in, out]``, dequantized if need be; a kernel is flattened
            to ``in = channels / groups * kernel``.
        alpha: A factor of the product, and so of what an adapter adds to the weight; its bias is
            added as it is.
        quantized: The stored weight is a rounding of the base's.
        kind: What the operator is.
        kernel: A convolution's kernel size.
        groups: A convolution's groups.
        added: Number of the operator's input that it adds to the product; ``None`` if it has none
            or it cannot be taken out.
        added_scale: A factor of what it adds.
        bias_is_fixed: The operator adds something that cannot be taken out of it.
        expose: Takes the product ``x W`` out of a larger operator, in place, and gives its site;
            called when a slot goes in, so an operator without one stays as it is. ``None`` where
            ``y`` is the product already.
    """

    node: ir.Node
    x: ir.Value
    y: ir.Value
    in_features: int
    out_features: int
    dtype: ir.DataType
    weight: Callable[[], np.ndarray]
    alpha: float = 1.0
    quantized: bool = False
    kind: ModuleKind = ModuleKind.LINEAR
    kernel: tuple[int, ...] = ()
    groups: int = 1
    added: int | None = None
    added_scale: float = 1.0
    bias_is_fixed: bool = False
    expose: Callable[[], Site] | None = None

    @property
    def fan_in(self) -> int:
        """Rows of the weight."""
        return self.in_features // self.groups * math.prod(self.kernel)

    @property
    def bias_input(self) -> int | None:
        """Number of the input that is a constant bias ``[out]``, added as it is."""
        if self.added is None or self.added_scale != 1.0:
            return None
        return self.added if vector(self.node.inputs[self.added], self.out_features) else None

    def exposed(self) -> Site:
        """Return the site with its product in the graph; changes the graph where it was not."""
        return self.expose() if self.expose is not None else self


def gives_only_its_shape(value: ir.Value) -> bool:
    """Tell whether a value is read, but not its numbers.

    ONNX Runtime's optimizer leaves a lookup of which only the shape is read beside the operator
    that it fused the lookup into: an adapter there would change nothing.
    """
    readers = {node.op_type for node in value.consumers()}
    return bool(readers) and readers <= _MEASURING and not value.is_graph_output()


def inputs_of(node: ir.Node, count: int) -> list[ir.Value | None]:
    """Return an operator's first inputs; those that it was not given are ``None``."""
    given = list(node.inputs[:count])
    return given + [None] * (count - len(given))
