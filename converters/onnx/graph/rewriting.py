"""New operators in the place of one that is taken apart.

The graph keeps its opset: what an attribute became an input of is written as that opset has it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

_AXES_ARE_INPUTS = 13  # of Split, Squeeze and Unsqueeze, from this opset on
_NEWEST = 1000


class Rewrite:
    """Operators under construction that stand before, and may replace, one of the graph's.

    Args:
        node: The graph's operator.
        stem: What their names begin with; its name unless told.
    """

    def __init__(self, node: ir.Node, stem: str = "") -> None:
        self.node = node
        self._stem = stem or node.name or node.outputs[0].name or node.op_type
        self.nodes: list[ir.Node] = []

    def add(
        self,
        name: str,
        operator: str,
        inputs: Sequence[ir.Value | None],
        dtypes: Sequence[ir.DataType],
        attributes: Mapping[str, object] | None = None,
        *,
        domain: str = "",
    ) -> list[ir.Value]:
        """Append an operator; return its outputs, one for each of ``dtypes``."""
        node = ir.node(
            operator,
            list(inputs),
            dict(attributes or {}),  # type: ignore[arg-type]
            domain=domain,
            num_outputs=len(dtypes),
            name=f"{self._stem}/{name}",
        )
        for number, (output, dtype) in enumerate(zip(node.outputs, dtypes, strict=True)):
            output.name = f"{node.name}/output_{number}"
            output.type = ir.TensorType(dtype)
        self.nodes.append(node)
        return list(node.outputs)

    def constant(self, name: str, array: np.ndarray) -> ir.Value:
        """Append a constant."""
        tensor = ir.tensor(array, name=f"{self._stem}/{name}")
        return self.add(name, "Constant", [], [tensor.dtype], {"value": tensor})[0]

    def split(
        self, name: str, value: ir.Value, sizes: Sequence[int], axis: int, dtype: ir.DataType
    ) -> list[ir.Value]:
        """Append ``Split`` into parts of these sizes."""
        inputs: list[ir.Value | None] = [value]
        attributes: dict[str, object] = {"axis": axis}
        if opset_of(self.node) >= _AXES_ARE_INPUTS:
            inputs.append(self.constant(f"{name}/sizes", np.array(sizes, np.int64)))
        else:
            attributes["split"] = list(sizes)
        return self.add(name, "Split", inputs, [dtype] * len(sizes), attributes)

    def unsqueeze(self, name: str, value: ir.Value, axis: int, dtype: ir.DataType) -> ir.Value:
        """Append ``Unsqueeze`` of one axis."""
        if opset_of(self.node) >= _AXES_ARE_INPUTS:
            axes = self.constant(f"{name}/axes", np.array([axis], np.int64))
            return self.add(name, "Unsqueeze", [value, axes], [dtype])[0]
        return self.add(name, "Unsqueeze", [value], [dtype], {"axes": [axis]})[0]

    def entry(self, name: str, value: ir.Value, index: int, dtype: ir.DataType) -> ir.Value:
        """Append what takes one entry of the first axis, which goes."""
        number = self.constant(f"{name}/index", np.array(index, np.int64))
        return self.add(name, "Gather", [value, number], [dtype], {"axis": 0})[0]

    def put_before(self) -> None:
        """Put the operators before the graph's."""
        owner = self.node.graph
        assert owner is not None
        owner.insert_before(self.node, self.nodes)

    def put_after(self, value: ir.Value, last: ir.Value) -> None:
        """Put the operators after the graph's.

        Args:
            value: The output of the graph's operator that they read.
            last: What all others read in its place, under its name.
        """
        owner = self.node.graph
        assert owner is not None
        own = {id(node) for node in self.nodes}
        readers = [usage for usage in value.uses() if id(usage.node) not in own]
        value.name, last.name = f"{value.name}/before", value.name
        for usage in readers:
            usage.node.replace_input_with(usage.idx, last)
        for index, output in enumerate(owner.outputs):
            if output is value:
                owner.outputs[index] = last
        owner.insert_after(self.node, self.nodes)

    def replace(self, outputs: Sequence[ir.Value | None]) -> None:
        """Put the operators in the place of the graph's.

        Args:
            outputs: What stands for each output of the operator, whose name it takes; ``None``
                for one that nothing reads.
        """
        self.put_before()
        old = [output for output, new in zip(self.node.outputs, outputs, strict=True) if new]
        new = [output for output in outputs if output is not None]
        for before, after in zip(old, new, strict=True):
            name, after.shape = before.name, before.shape
            before.name = f"{name}/taken_apart"
            after.name = name
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        owner = self.node.graph
        assert owner is not None
        owner.remove(self.node, safe=True)


def opset_of(node: ir.Node) -> int:
    """Return the version of the standard operators in a node's graph."""
    graph: object = node.graph
    while graph is not None:
        imports: Mapping[str, int] = getattr(graph, "opset_imports", {})
        version = imports.get("", imports.get("ai.onnx"))
        if version is not None:
            return int(version)
        parent = getattr(graph, "parent_node", None)
        graph = parent.graph if parent is not None else None
    return _NEWEST
