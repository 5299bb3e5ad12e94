"""A chain of new nodes, named after what they are for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir


class NodeChain:
    """Nodes under construction.

    Args:
        stem: What their names begin with.
        dtype: Element type of their outputs, but for shapes.
    """

    def __init__(self, stem: str, dtype: ir.DataType) -> None:
        self._stem = stem
        self._dtype = dtype
        self.nodes: list[ir.Node] = []

    def add(
        self,
        name: str,
        operator: str,
        inputs: Sequence[ir.Value],
        attributes: Mapping[str, ir.Attr] | None = None,
    ) -> ir.Value:
        """Append a node of the standard operators; return its output."""
        node = ir.Node(
            "",
            operator,
            inputs,
            (attributes or {}).values(),
            num_outputs=1,
            name=f"{self._stem}/{name}",
        )
        of_shape = operator == "Shape" or (operator == "Concat" and _is_shape(inputs[0]))
        return self._append(node, ir.DataType.INT64 if of_shape else self._dtype)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Append a constant."""
        value = ir.tensor(array, name=name)
        node = ir.Node(
            "", "Constant", [], [ir.AttrTensor("value", value)], name=f"{self._stem}/{name}"
        )
        return self._append(node, value.dtype)

    def _append(self, node: ir.Node, dtype: ir.DataType) -> ir.Value:
        self.nodes.append(node)
        output = node.outputs[0]
        output.name = f"{node.name}/output_0"
        output.type = ir.TensorType(dtype)
        return output


def _is_shape(value: ir.Value) -> bool:
    return value.dtype == ir.DataType.INT64
