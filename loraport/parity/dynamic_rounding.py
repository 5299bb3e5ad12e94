"""Tell what int8 kernels round in every run from other differences.

Dynamic int8 graphs round the activations of each product to 8 bits of their own range
(``DynamicQuantizeLinear``). Routers of experts choose others where two are nearly alike, and all
outputs are far off then. The weights, slots and adapters are right where the same graph is as near
to PyTorch as 4-bit ones must be once these activations stay what they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.parity.check import Check
from loraport.parity.metrics import Comparison
from loraport.parity.tolerances import AS_DEPLOYED, tolerance_for

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

_UNROUNDED = tolerance_for("int4", "cpu")  # the graph's own weights, float32 activations
_Readers = dict[str, list["NodeProto"]]


def judged_unrounded(failed: Check, exact: Comparison) -> Check:
    """Judge outputs that are far from torch's by the same graph's without rounded activations.

    Args:
        failed: What was seen with them, and its numbers.
        exact: What was seen without.
    """
    assert failed.comparison is not None
    alone = exact.within(_UNROUNDED)
    passed = alone and failed.comparison.within(AS_DEPLOYED)
    says = "the cause" if alone else "not the only cause"
    detail = (
        f"activations rounded to 8 bits by the kernel are {says}: without that max abs is "
        f"{exact.max_abs:.2e}, relative {exact.relative:.2e}"
    )
    return replace(failed, passed=passed, detail=detail)


def without_rounded_activations(file: Path) -> bytes | None:
    """Return a graph whose integer products read the activations as they are.

    Weights stay the integers that they are, less their zero points, and are scaled as before.

    Args:
        file: The ``.onnx`` file; its data file is not read.

    Returns:
        The graph serialized, or ``None`` if it rounds none so.
    """
    import onnx

    model = onnx.load(str(file), load_external_data=False)
    readers: _Readers = defaultdict(list)
    for node in _nodes(model.graph):
        for name in node.input:
            readers[name].append(node)
    given = {value.name for value in model.graph.output}
    rounding = [
        node
        for node in model.graph.node
        if node.op_type == "DynamicQuantizeLinear" and _for_products(node, readers, given)
    ]
    if not rounding:
        return None
    products = [reader for node in rounding for reader in readers[node.output[0]]]
    made: list[NodeProto] = []
    for node in model.graph.node:
        if any(node is each for each in rounding):
            made += _as_it_is(node)
        elif any(node is each for each in products):
            made += _in_floats(node)
        else:
            made.append(node)
    changed = {name for node in (*rounding, *products) for name in node.output}
    kept = [value for value in model.graph.value_info if value.name not in changed]
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in made]
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
    model.graph.value_info.extend(kept)
    return bytes(model.SerializeToString())


def _for_products(rounding: NodeProto, readers: _Readers, given: set[str]) -> bool:
    """Tell whether all that reads rounded activations are products that are cast to floats."""
    rounded, _, zero = rounding.output
    products = readers[rounded]
    return (
        given.isdisjoint((rounded, zero))
        and all(
            node.op_type == "MatMulInteger"
            and [node.input[0], *node.input[2:3]] == [rounded, zero]
            and node.output[0] not in given
            and all(reader.op_type == "Cast" for reader in readers[node.output[0]])
            for node in products
        )
        and all(any(reader is node for node in products) for reader in readers[zero])
    )


def _as_it_is(rounding: NodeProto) -> Sequence[NodeProto]:
    from onnx import helper

    rounded, scale, _ = rounding.output
    return [
        helper.make_node("Identity", rounding.input[:1], [rounded]),
        helper.make_node("Constant", [], [scale], value_float=1.0),
    ]


def _in_floats(product: NodeProto) -> Sequence[NodeProto]:
    from onnx import TensorProto, helper

    x, weight = product.input[:2]
    out = product.output[0]
    numbers = f"{out}::weight"
    made = [helper.make_node("Cast", [weight], [numbers], to=TensorProto.FLOAT)]
    if len(product.input) > 3 and product.input[3]:
        zero, moved = f"{out}::zero", f"{out}::moved"
        made += [
            helper.make_node("Cast", [product.input[3]], [zero], to=TensorProto.FLOAT),
            helper.make_node("Sub", [numbers, zero], [moved]),
        ]
        numbers = moved
    return [*made, helper.make_node("MatMul", [x, numbers], [out])]


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Yield the operators of a graph, its branches' and bodies' too."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in (*attribute.graphs, attribute.g):
                yield from _nodes(inner)
