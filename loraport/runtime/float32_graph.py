"""A graph in halves computing in float32: what its own kernels round is measured beside it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraport.runtime.full_precision import ask_for_float32

if TYPE_CHECKING:
    import onnx_ir as ir

# Attributes that say in which type a node's output is.
_TYPES = ("to", "dtype", "output_dtype")


def in_float32(graph: Path) -> bytes | None:
    """Return the graph serialized so that it computes in float32, or ``None`` if it asks for that.

    What it is given, its weights and constants stay as they are, in their types and in their data
    files, which a session finds by the graph's directory. Computed outputs in halves become
    float32.
    """
    import onnx
    import onnx_ir as ir

    proto = onnx.load(str(graph), load_external_data=False)
    rounded = ask_for_float32(proto)
    model = ir.serde.deserialize_model(proto)
    inner: list[ir.Graph | ir.Function] = [*model.graph.subgraphs()]
    for function in model.functions.values():
        inner += [function, *function.subgraphs()]
    halves = [_widen(model.graph, given=True), *(_widen(body, given=False) for body in inner)]
    if not any(halves):
        return proto.SerializeToString() if rounded else None
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
    nodes = list(graph)
    constants = dict.fromkeys(node for node in nodes if _makes_halves(node, halves))
    known = (*graph.initializers.values(), *(graph.inputs if given else ()))
    kept = dict.fromkeys(value for value in known if value.dtype in halves)
    kept |= dict.fromkeys(node.outputs[0] for node in constants)
    widened = [_widen_attributes(node, halves) for node in nodes if node not in constants]
    changed = bool(kept) or any(widened)
    for value in (*graph.inputs, *(output for node in nodes for output in node.outputs)):
        if value.dtype in halves and value not in kept:
            value.dtype = ir.DataType.FLOAT
            changed = True
    for value in kept:
        cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT})
        wide = cast.outputs[0]
        wide.name, wide.shape = f"{value.name}::float32", value.shape
        wide.dtype = ir.DataType.FLOAT
        for reader, index in [use for use in value.uses() if use.node is not cast]:
            reader.replace_input_with(index, wide)
        if not given:
            graph.outputs[:] = [wide if each is value else each for each in graph.outputs]
        if (maker := value.producer()) is not None:
            graph.insert_after(maker, cast)
        elif nodes:
            graph.insert_before(nodes[0], cast)
        else:
            graph.append(cast)
    return changed


def _makes_halves(node: ir.Node, halves: tuple[ir.DataType, ir.DataType]) -> bool:
    """Tell whether a node is a constant in halves, which may be as large as any weight."""
    value = node.attributes.get("value") if node.op_type == "Constant" else None
    return value is not None and not value.is_ref() and value.as_tensor().dtype in halves


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
