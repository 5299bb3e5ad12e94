"""Where a product's weight comes from that no graph stores as one constant."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from converters.onnx.graph.constants import constant

MULTIPLYING = frozenset(("Conv", "Gemm", "MatMul"))
_MOVING = ("Gather", "GatherND", "Slice", "Squeeze", "Unsqueeze", "Reshape", "Transpose", "Cast")


class WeightOrigins:
    """Where the second factors of a graph's products come from.

    Args:
        nodes: The graph's operators, those of its subgraphs too.
    """

    def __init__(self, nodes: Iterable[ir.Node]) -> None:
        self._fixed: dict[int, bool] = {}
        # What each body calls its inputs -> what a Scan goes through for it.
        self._inner: dict[int, ir.Value | None] = {}
        for node in nodes:
            body = node.attributes.get("body")
            if body is None or body.type != ir.AttributeType.GRAPH:
                continue
            inner = body.as_graph().inputs
            first = len(node.inputs) - node.attributes.get_int("num_scan_inputs", 0)
            scanned = [*[None] * first, *node.inputs[first:]]
            known = scanned if len(scanned) == len(inner) else [None] * len(inner)
            self._inner |= {id(value): outer for value, outer in zip(inner, known, strict=True)}

    def why_not_stored(self, weight: ir.Value) -> str:
        """Say why the second factor of a product has no slot; nothing where it is no weight.

        Args:
            weight: The factor, which is no constant.
        """
        maker = weight.producer()
        if maker is not None and _is_fixed(weight, self._fixed):
            return f"its weight is not stored, {maker.op_type} computes it"
        if self._is_picked(weight):
            return "its weight is one of several, picked in the run"
        if self._is_given(weight):
            return "its weight is an input of the graph, which stores none"
        return ""

    def _is_given(self, value: ir.Value) -> bool:
        """Tell whether a matrix or kernel is asked for in every run."""
        if not value.is_graph_input() or id(value) in self._inner:
            return False
        reads = {use.node.op_type for use in value.uses() if use.idx == 1}
        # Attention may multiply two inputs; a matrix for all rows is a weight.
        return reads != {"MatMul"} or (value.shape is not None and len(value.shape) == 2)

    def _is_picked(self, value: ir.Value) -> bool:
        """Tell whether a matrix is an entry of a larger constant, as those of experts are.

        Layers of one kind may lie in one constant that a ``Scan`` goes through, and an ``If`` may
        have a matrix in each branch.
        """
        seen: ir.Value | None = value
        while seen is not None:
            node = seen.producer()
            if node is None:
                seen = self._inner.get(id(seen))
            elif node.op_type == "If":
                return _has_matrices(node, seen)
            else:
                seen = node.inputs[0] if node.op_type in _MOVING and node.inputs else None
            found = constant(seen)
            if found is not None:
                return len(found.shape) > 2 and found.dtype.is_floating_point()
        return False


def only_multiplies(value: ir.Value) -> bool:
    """Tell whether a value is read as the second factor of products alone, wherever it is moved."""
    if value.is_graph_output() or not value.uses():
        return False
    return all(
        (use.idx == 0 and use.node.op_type in _MOVING and only_multiplies(use.node.outputs[0]))
        or (use.idx == 1 and use.node.op_type in MULTIPLYING)
        for use in value.uses()
    )


def _has_matrices(node: ir.Node, value: ir.Value) -> bool:
    """Tell whether a value is a constant matrix or kernel in every branch of an ``If``."""
    number = node.outputs.index(value)
    attributes = node.attributes.values()
    branches = [each.as_graph() for each in attributes if each.type == ir.AttributeType.GRAPH]
    found = [constant(each) for branch in branches for each in branch.outputs[number : number + 1]]
    return all(
        each is not None and len(each.shape) >= 2 and each.dtype.is_floating_point()
        for each in found
    )


def _is_fixed(value: ir.Value, known: dict[int, bool]) -> bool:
    """Tell whether a value is the same whatever the graph's inputs are."""
    left = [(value, False)]
    while left:
        entry, seen = left.pop()
        producer = entry.producer()
        if id(entry) in known:
            continue
        if producer is None:
            known[id(entry)] = constant(entry) is not None
        elif any(
            attribute.type == ir.AttributeType.GRAPH for attribute in producer.attributes.values()
        ):
            known[id(entry)] = False
        elif seen:
            inputs = [each for each in producer.inputs if each is not None]
            known[id(entry)] = all(known.get(id(each), False) for each in inputs)
        else:
            left.append((entry, True))
            left += [(each, False) for each in producer.inputs if each is not None]
    return known[id(value)]
