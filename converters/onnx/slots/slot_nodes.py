"""The nodes of one slot: ``y' = gain * y + (x A) B + bias``.

How ``x A`` and ``B`` are computed depends on the kind of module:

- linear: two ``MatMul``, the second with the sum in one ``Gemm`` where values are matrices;
- embedding: the rows of ``A`` that the tokens name, then a ``MatMul``;
- convolution: the base's convolution with the kernel ``A``, then a 1×1 one.

`controls` says how rows of a batch get adapters of their own. A strength ``s`` scales the whole
change, the gain's part too:
``y' = y + s * ((gain * y - y) + (x A) B + bias)``, which is ``y`` bit for bit at ``s = 0``.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from converters.onnx.graph.nodes import NodeChain
from converters.onnx.graph.rewriting import opset_of
from converters.onnx.graph.site import Site
from converters.onnx.slots.controls import Controls
from loraport.adapter import ModuleKind
from loraport.bundle.slots import Slot

_OPTIONAL_IN_GEMM = 11  # what it adds, from this opset on
_CONV_ATTRIBUTES = ("auto_pad", "dilations", "pads", "strides")


def add_slot_nodes(
    graph: ir.Graph,
    slot: Slot,
    site: Site,
    inputs: Mapping[str, ir.Value],
    controls: Controls,
) -> None:
    """Put a slot's nodes after a site's operator; all readers of its output read theirs.

    Args:
        graph: The graph, changed in place.
        slot: The slot.
        site: Where it goes.
        inputs: Role → graph input.
        controls: The graph's controls.
    """
    # A module called twice has two sites, so node names carry the operator's name too.
    chain = NodeChain(f"{slot.name}.lora/{site.node.name or site.y.name}", site.dtype)
    readers = list(site.y.uses())
    added = _take_out(chain, site) if slot.gain else None
    if controls.strength and (slot.gain or slot.bias):
        result = _scaled_as_a_whole(chain, slot, site, inputs, controls)
    else:
        y = site.y
        if slot.gain:
            y = chain.add("gain", "Mul", [y, _over_output(chain, slot, inputs["gain"])])
        result = _changed(chain, slot, site, inputs, controls, y)
        if slot.bias:
            bias = _over_output(chain, slot, inputs["bias"])
            result = chain.add("bias", "Add", [result, bias])
    if added is not None:
        own = _over_output(chain, slot, added)
        result = chain.add("own_bias", "Add", [result, own])
    result.shape = site.y.shape
    last = site.y.producer()
    assert last is not None
    owner = graph if last.graph is None else last.graph
    if site.y.is_graph_output():
        result.name, site.y.name = site.y.name, f"{site.y.name}/base"
    for usage in readers:
        usage.node.replace_input_with(usage.idx, result)
    outputs = owner.outputs
    for index, output in enumerate(outputs):
        if output is site.y:
            outputs[index] = result
    owner.insert_after(last, chain.nodes)


def _changed(
    chain: NodeChain,
    slot: Slot,
    site: Site,
    inputs: Mapping[str, ir.Value],
    controls: Controls,
    y: ir.Value,
) -> ir.Value:
    """Return ``y + (x A) B``, where rows may have adapters and lanes a strength."""
    if controls.per_row and slot.kind is ModuleKind.LINEAR:
        change = controls.own_change(chain, slot, site, inputs)
        return chain.add("Add", "Add", [y, _times_alpha(chain, site, change)])
    hidden = controls.on_hidden(chain, slot, site, _hidden(chain, slot, site, inputs))
    if _is_matrix(slot, site):
        return chain.add("B", "Gemm", [hidden, inputs["lora_B"], y])
    return chain.add("Add", "Add", [y, _widened(chain, slot, inputs, hidden)])


def _scaled_as_a_whole(
    chain: NodeChain,
    slot: Slot,
    site: Site,
    inputs: Mapping[str, ir.Value],
    controls: Controls,
) -> ir.Value:
    """Return ``y`` with a change that a gain or bias is part of, times the strength."""
    y = site.y
    change = _widened(chain, slot, inputs, _hidden(chain, slot, site, inputs))
    if slot.bias:
        change = chain.add("bias", "Add", [change, _over_output(chain, slot, inputs["bias"])])
    if slot.gain:
        gained = chain.add("gain", "Mul", [y, _over_output(chain, slot, inputs["gain"])])
        moved = chain.add("moved", "Sub", [gained, y])
        change = chain.add("change", "Add", [moved, change])
    change = chain.add("strength", "Mul", [change, controls.factor(site.dtype)])
    return chain.add("Add", "Add", [y, change])


def _is_matrix(slot: Slot, site: Site) -> bool:
    """Tell whether a linear module's values are ``[rows, features]``."""
    shape = site.x.shape
    return slot.kind is ModuleKind.LINEAR and shape is not None and len(shape) == 2


def _hidden(chain: NodeChain, slot: Slot, site: Site, inputs: Mapping[str, ir.Value]) -> ir.Value:
    """Return ``x A``."""
    a = inputs["lora_A"]
    if slot.kind is ModuleKind.EMBEDDING:
        return chain.add("A", "Gather", [a, site.x], {"axis": ir.AttrInt64("axis", 0)})
    if slot.kind is ModuleKind.CONV:
        taken = {
            name: attribute
            for name in _CONV_ATTRIBUTES
            if (attribute := site.node.attributes.get(name)) is not None
        }
        return chain.add("A", "Conv", [site.x, a], taken)
    return _times_alpha(chain, site, chain.add("A", "MatMul", [site.x, a]))


def _times_alpha(chain: NodeChain, site: Site, value: ir.Value) -> ir.Value:
    """Scale what an adapter adds as the operator scales its product."""
    if site.alpha == 1.0:
        return value
    alpha = chain.constant("alpha", np.array(site.alpha, site.dtype.numpy()))
    return chain.add("scaled", "Mul", [value, alpha])


def _widened(
    chain: NodeChain, slot: Slot, inputs: Mapping[str, ir.Value], hidden: ir.Value
) -> ir.Value:
    """Return ``(x A) B``."""
    operator = "Conv" if slot.kind is ModuleKind.CONV else "MatMul"
    return chain.add("B", operator, [hidden, inputs["lora_B"]])


def _over_output(chain: NodeChain, slot: Slot, vector: ir.Value) -> ir.Value:
    """Shape a vector ``[out]`` so that it broadcasts over the output."""
    if slot.kind is not ModuleKind.CONV:
        return vector
    shape = chain.constant(f"{vector.name}/shape", np.array([-1] + [1] * len(slot.kernel)))
    return chain.add(f"{vector.name}/shaped", "Reshape", [vector, shape])


def _take_out(chain: NodeChain, site: Site) -> ir.Value | None:
    """Remove what the operator adds to its product, which a gain must not scale; return it."""
    if site.added is None:
        return None
    node, added = site.node, site.node.inputs[site.added]
    assert added is not None
    nothing = None
    if node.op_type == "Gemm" and opset_of(node) < _OPTIONAL_IN_GEMM:
        before = NodeChain(f"{node.name or site.y.name}.lora", site.dtype)
        nothing = before.constant("nothing", np.zeros(1, site.dtype.numpy()))
        assert node.graph is not None
        node.graph.insert_before(node, before.nodes)
    node.replace_input_with(site.added, nothing)
    if site.added_scale == 1.0:
        return added
    scale = chain.constant("added_scale", np.array(site.added_scale, site.dtype.numpy()))
    return chain.add("scaled_bias", "Mul", [added, scale])
