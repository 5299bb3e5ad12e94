"""Constants that loops carry from step to step unchanged, read from outside instead.

tf2onnx lets the body of a recurrent layer's ``Loop`` carry its weights: the body passes on what it
was given. There an operator seems to read something computed, though it is the weight that
operators outside may read, too, and what an adapter adds must be added in both places.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from converters.onnx.graph.constants import constant

_LOOP_COUNTERS = 2  # the step's number and the condition come before what a Loop carries
_OWN_SCAN_OPSET = 9  # before, Scan had another first input


def read_carried_constants_outside(model: ir.Model) -> None:
    """Let operators in the bodies of loops read constants that are only carried, in place."""
    for node in list(model.graph.all_nodes()):
        for outer, inner, last in _carried(node, model.graph.opset_imports.get("", 0)):
            if constant(outer) is None or not _passed_on(inner, last):
                continue
            for usage in tuple(inner.uses()):
                usage.node.replace_input_with(usage.idx, outer)


def _carried(node: ir.Node, opset: int) -> Iterator[tuple[ir.Value, ir.Value, ir.Value]]:
    """Yield what a loop carries: its first value, in the body, and at the end of a step."""
    if node.domain not in ("", "ai.onnx") or "body" not in node.attributes:
        return
    body = node.attributes["body"].as_graph()
    if node.op_type == "Loop":
        places = node.inputs[2:], body.inputs[_LOOP_COUNTERS:], body.outputs[1:]
    elif node.op_type == "Scan" and opset >= _OWN_SCAN_OPSET:
        count = len(node.inputs) - node.attributes.get_int("num_scan_inputs", 0)
        places = node.inputs[:count], body.inputs[:count], body.outputs[:count]
    else:
        return
    for outer, inner, last in zip(*places, strict=False):  # what is scanned comes after
        if outer is not None:
            yield outer, inner, last


def _passed_on(inner: ir.Value, last: ir.Value) -> bool:
    """Tell whether a step ends with the value that it began with."""
    seen: ir.Value | None = last
    while seen is not None and seen is not inner:
        maker = seen.producer()
        seen = maker.inputs[0] if maker is not None and maker.op_type == "Identity" else None
    return seen is inner
