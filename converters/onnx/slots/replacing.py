"""Slots for whole parameters: ``modules_to_save``, classifier heads, trained norms and biases.

The parameter becomes a graph input ``PARAMETER.lora_saved`` with its own value as the default,
which lies where it lay: the initializer has another name, the data file stays as it is.
A norm's weight that the graph holds with one added (Gemma's) is an initializer anew, to which the
graph adds one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch

from converters.onnx.graph.nodes import NodeChain
from converters.onnx.graph.source_graph import MappedTensor
from converters.onnx.graph.torch_dtypes import TORCH_DTYPES
from converters.onnx.modules.holders import NOT_AS_IT_IS, Holder, Holders
from converters.onnx.slots.input_names import names_outside, rename_inner, require_free
from loraport.bundle.slots import ReplacementSlot
from loraport.errors import Problems
from loraport.naming import names_parameter, slot_saved

_PACKED_BIAS = (
    "the graph does not hold it as it is: it is packed with others or part of one; export again "
    "with bias among --slots, which takes it"
)


@dataclass(frozen=True, eq=False)
class Replaceable:
    """What was made replaceable.

    Attributes:
        slots: The parameters' inputs.
        base_values: Graph input → the base's value.
        refused: Parameter path → why it cannot be replaced.
    """

    slots: tuple[ReplacementSlot, ...] = ()
    base_values: Mapping[str, torch.Tensor] = field(default_factory=dict)
    refused: Mapping[str, str] = field(default_factory=dict)


def make_replaceable(
    graph: ir.Graph,
    names: Sequence[str],
    holders: Holders,
    biases: Mapping[str, bool] | None = None,
) -> Replaceable:
    """Turn parameters into inputs, in place.

    Args:
        graph: The graph.
        names: What the user calls them: modules, parameters, or leaves such as ``bias``.
        holders: Finds parameters in the graph.
        biases: Biases of modules with slots → whether the slot takes a bias, and with it what
            training moved the module's own by.

    Raises:
        LoraportError: Naming every name that no parameter in the graph answers to, and why; or an
            input, output or constant that is called like a parameter's input.
    """
    problems = Problems()
    slots: list[ReplacementSlot] = []
    values: dict[str, torch.Tensor] = {}
    refused: dict[str, str] = {}
    biases = biases or {}
    for name in names:
        wanted = [path for path in holders.parameters() if names_parameter(name, path)]
        for parameter in wanted:
            if any(slot.parameter == parameter for slot in slots) or parameter in refused:
                continue
            holder = holders.find(parameter)
            if isinstance(holder, str):
                if not biases.get(parameter):
                    packed = holder == NOT_AS_IT_IS and parameter in biases
                    refused[parameter] = _PACKED_BIAS if packed else holder
                continue
            slot = _slot(parameter, holder)
            require_free(slot.input, graph, names_outside(graph))
            own = holder.less_one
            values[slot.input] = _as_torch(holder.value) if own is None else _own(slot, own)
            _redirect(graph, slot, holder)
            slots.append(slot)
        taken = {slot.parameter for slot in slots}
        if not any(parameter in taken or biases.get(parameter) for parameter in wanted):
            why = next((refused[path] for path in wanted if path in refused), "")
            got = f"none: {wanted[0]}: {why}" if why else "none of this name"
            problems.add(name, "a parameter that the graph can take anew", got)
    problems.raise_if_any("--replace")
    rename_inner(graph, {slot.input for slot in slots})
    return Replaceable(tuple(slots), values, refused)


def _slot(parameter: str, holder: Holder) -> ReplacementSlot:
    stored = holder.value.const_value
    assert stored is not None
    return ReplacementSlot(
        parameter=parameter,
        input=slot_saved(parameter),
        shape=tuple(int(size) for size in stored.shape.numpy()),
        dtype=stored.dtype.name,
        transposed=holder.transposed,
    )


def _redirect(graph: ir.Graph, slot: ReplacementSlot, holder: Holder) -> None:
    """Let the operators that use a parameter read an overridable initializer instead."""
    stored = holder.value.const_value
    assert stored is not None
    const = _renamed(stored, slot.input)
    if holder.less_one is not None:
        array = _own(slot, holder.less_one).float().numpy().astype(stored.dtype.numpy())
        const = ir.tensor(array, name=slot.input)
    value = ir.Value(
        name=slot.input,
        shape=ir.Shape(slot.shape),
        type=ir.TensorType(stored.dtype),
        const_value=const,
    )
    graph.inputs.append(value)
    graph.register_initializer(value)
    if holder.less_one is not None:
        value = _plus_one(graph, slot, value)
    for use in holder.uses:
        if use.node.op_type == "Transpose" and _gather_columns(use.node, value):
            continue
        use.node.replace_input_with(use.idx, value)
    if not holder.value.uses() and not holder.value.is_graph_output():
        graph.initializers.pop(str(holder.value.name))


def _own(slot: ReplacementSlot, tensor: torch.Tensor) -> torch.Tensor:
    """Return a parameter as the slot takes it."""
    return tensor.detach().cpu().to(TORCH_DTYPES[slot.dtype]).contiguous()


def _plus_one(graph: ir.Graph, slot: ReplacementSlot, value: ir.Value) -> ir.Value:
    """Return a value and one, computed before everything else in the graph."""
    assert value.dtype is not None
    chain = NodeChain(f"{slot.parameter}.lora", value.dtype)
    one = chain.constant("one", np.ones(1, value.dtype.numpy()))
    result = chain.add("plus_one", "Add", [value, one])
    result.shape = value.shape
    graph.insert_before(graph[0], chain.nodes)
    return result


def _gather_columns(transpose: ir.Node, value: ir.Value) -> bool:
    """Look up columns of ``value`` where rows of its transpose were looked up; say if that went.

    An embedding that shares the head's weight ``[dim, vocab]`` reads it through a ``Transpose``,
    which ONNX Runtime computes once for a constant, but in every run for an input.
    """
    readers = [use.node for use in transpose.outputs[0].uses()]
    if len(value.shape or ()) != 2 or transpose.outputs[0].is_graph_output():
        return False
    for node in readers:
        tokens = node.inputs[1] if node.op_type == "Gather" else None
        if tokens is None or tokens.shape is None or node.attributes.get_int("axis", 0) != 0:
            return False
    for node in readers:
        tokens = node.inputs[1]
        assert tokens is not None
        assert tokens.shape is not None
        axes = [*range(1, len(tokens.shape) + 1), 0]
        columns = ir.node("Gather", [value, tokens], {"axis": 1}, name=f"{node.name}/columns")
        rows = ir.node("Transpose", columns.outputs, {"perm": axes}, name=f"{node.name}/rows")
        for new in (columns, rows):
            new.outputs[0].name = f"{new.name}/output_0"
            new.outputs[0].type = node.outputs[0].type
        rows.outputs[0].shape = node.outputs[0].shape
        graph = node.graph
        assert graph is not None
        graph.insert_before(node, (columns, rows))
        node.outputs[0].replace_all_uses_with(rows.outputs[0], replace_graph_outputs=True)
        graph.remove(node, safe=True)
    owner = transpose.graph
    assert owner is not None
    owner.remove(transpose, safe=True)
    return True


def _renamed(stored: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """Return the same tensor, at its place in the same file, by another name."""
    if not isinstance(stored, ir.ExternalTensor):
        return ir.Tensor(stored.numpy(), dtype=stored.dtype, name=name)
    return MappedTensor(
        stored.location,
        stored.offset,
        stored.length,
        stored.dtype,
        shape=ir.Shape(stored.shape.numpy()),
        name=name,
        base_dir=stored.base_dir,
    )


def _as_torch(value: ir.Value) -> torch.Tensor:
    stored = value.const_value
    assert stored is not None
    dtype = TORCH_DTYPES[stored.dtype.name]
    array = stored.numpy()
    if dtype is torch.bfloat16:
        return torch.from_numpy(array.astype("float32")).to(dtype)
    return torch.from_numpy(array.copy())
