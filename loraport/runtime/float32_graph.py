"""A graph in halves computing in float32: what its own kernels round is measured beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraport.runtime.full_precision import with_float32_activations

if TYPE_CHECKING:
    import onnx_ir as ir

# Attributes that say in which type a node's output is.
_TYPES = ("to", "dtype", "output_dtype")


def in_float32(graph: Path) -> bytes | None:
    """Return the graph serialized so that it computes in float32, or ``None`` if it asks for that.

    What it is given and its weights stay as they are, in their types and in their data file, which
    a session finds by the graph's directory. Outputs in halves become float32.
    """
    import onnx
    import onnx_ir as ir

    rounding = with_float32_activations(graph)
    if rounding is not None:
        proto = onnx.load_from_string(rounding)
    else:
        proto = onnx.load(str(graph), load_external_data=False)
    model = ir.serde.deserialize_model(proto)
    inner: list[ir.Graph | ir.Function] = [*model.graph.subgraphs()]
    for function in model.functions.values():
        inner += [function, *function.subgraphs()]
    halves = [_widen(model.graph, given=True), *(_widen(body, given=False) for body in inner)]
    if not any(halves):
        return rounding
    return bytes(ir.serde.serialize_model(model).SerializeToString())


def _widen(body: ir.Graph | ir.Function, *, given: bool) -> bool:
    """Let a graph or function compute in float32; tell whether anything in it was in halves.

    Args:
        body: It is changed.
        given: Its inputs keep their types, as those of a model's own graph do.
    """
    import onnx_ir as ir

    halves = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
    graph = body.graph if isinstance(body, ir.Function) else body
    known = (*graph.initializers.values(), *(graph.inputs if given else ()))
    kept = dict.fromkeys(value for value in known if value.dtype in halves)
    nodes = list(graph)
    widened = [_widen_attributes(node, halves) for node in nodes]
    changed = bool(kept) or any(widened)
    for value in (*graph.inputs, *(output for node in nodes for output in node.outputs)):
        if value.dtype in halves and value not in kept:
            value.dtype = ir.DataType.FLOAT
            changed = True
    for value in kept if nodes else ():
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
        wide = cast.outputs[0]
        wide.name, wide.shape = f"{value.name}::float32", value.shape
        wide.dtype = ir.DataType.FLOAT
        readers = [use for use in value.uses() if use.node is not cast]
        for reader, index in readers:
            reader.replace_input_with(index, wide)
        graph.insert_before(nodes[0], cast)
    return changed


def _widen_attributes(node: ir.Node, halves: tuple[ir.DataType, ir.DataType]) -> bool:
    """Let what a node makes be in float32; tell whether it was in halves."""
    import onnx_ir as ir

    changed = False
    for name, attribute in list(node.attributes.items()):
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype in halves:
            tensor = attribute.as_tensor()
            wide = ir.tensor(tensor.numpy().astype("float32"), name=tensor.name)
            node.attributes[name] = ir.AttrTensor(name, wide)
            changed = True
        elif name in _TYPES and attribute.value in halves:
            node.attributes[name] = ir.AttrInt64(name, ir.DataType.FLOAT)
            changed = True
    return changed
