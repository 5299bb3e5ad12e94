"""Modules whose weights lost their names are called by the biases that are added to them."""

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS, run

SIZE = 4
RANDOM = np.random.default_rng(0)
OTHER = RANDOM.standard_normal((SIZE, SIZE)).astype(np.float32)
OWN = RANDOM.standard_normal((SIZE, SIZE)).astype(np.float32)
VECTORS = {
    name: RANDOM.standard_normal(SIZE).astype(np.float32)
    for name in ("net.0.up.bias", "net.0.norm.weight", "net.0.norm.bias")
}
NORM = ["net.0.norm.weight", "net.0.norm.bias"]


def graph(nodes, own=OWN, output="y"):
    """Return ``tanh(x OTHER)`` and what these nodes make of it and of ``val_2``."""
    first = [
        helper.make_node("MatMul", ["x", "val_1"], ["h"], name="node_MatMul_1"),
        helper.make_node("Tanh", ["h"], ["t"]),
    ]
    x, y = (helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", SIZE]) for n in ("x", output))
    arrays = {"val_1": OTHER, "val_2": own, **VECTORS}
    read = {name for node in nodes for name in node.input} | {"val_1"}
    stored = [numpy_helper.from_array(arrays[name], name) for name in arrays if name in read]
    made = helper.make_graph([*first, *nodes], "g", [x], [y], stored)
    return helper.make_model(made, opset_imports=DOMAINS, ir_version=10)


def node(operator, inputs, output="y", domain="com.microsoft"):
    return helper.make_node(operator, inputs, [output], name=f"node_{operator}_7", domain=domain)


PRODUCT = node("MatMul", ["t", "val_2"], "p", "")
BIAS = "net.0.up.bias"
ADDED = {
    "Add": [PRODUCT, node("Add", ["p", BIAS], domain="")],
    "Add, turned": [PRODUCT, node("Add", [BIAS, "p"], domain="")],
    "BiasGelu": [PRODUCT, node("BiasGelu", ["p", BIAS])],
    "FastGelu": [PRODUCT, node("FastGelu", ["p", BIAS])],
    "SkipLayerNormalization": [PRODUCT, node("SkipLayerNormalization", ["p", "t", *NORM, BIAS])],
    "SkipSimplifiedLayerNormalization": [
        PRODUCT,
        node("SkipSimplifiedLayerNormalization", ["t", "p", NORM[0], BIAS]),
    ],
    "Gemm": [node("Gemm", ["t", "val_2", BIAS], domain="")],
}


@pytest.mark.parametrize("operator", ADDED)
def test_the_bias_names_the_module(slotted, adapter, operator):
    made = slotted(graph(ADDED[operator]))
    first, second = made.slots
    assert (first.name, second.name) == ("node_MatMul_1", "net.0.up")
    x = RANDOM.standard_normal((3, SIZE)).astype(np.float32)
    tensors = adapter(second)
    change = tensors[second.input_a].astype(np.float64) @ tensors[second.input_b]
    expected = run(graph(ADDED[operator], (OWN + change).astype(np.float32)), x=x)
    got = made.run(x=x, **tensors)[0]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(got - made.run_original(x=x)[0]).max() > 0.1


@pytest.mark.parametrize(
    "nodes",
    [
        # A normalization's bias, not the product's.
        [PRODUCT, node("SkipLayerNormalization", ["p", "t", *NORM])],
        # Not the product alone.
        [PRODUCT, node("Tanh", ["p"], "r", ""), node("Add", ["r", BIAS], domain="")],
        # Equal biases of two modules are one constant.
        [
            PRODUCT,
            node("Add", ["p", BIAS], "q", ""),
            helper.make_node("Add", ["q", BIAS], ["y"], name="node_Add_8"),
        ],
        [PRODUCT, node("Add", ["p", NORM[0]], domain="")],
    ],
)
def test_other_constants_do_not(slotted, nodes):
    assert [slot.name for slot in slotted(graph(nodes)).slots] == ["node_MatMul_1", "node_MatMul_7"]


def test_a_weight_that_is_used_twice_has_the_bias_of_both(slotted):
    nodes = [
        PRODUCT,
        node("Add", ["p", BIAS], "q", ""),
        helper.make_node("MatMul", ["q", "val_2"], ["r"], name="node_MatMul_8"),
        helper.make_node("Add", ["r", BIAS], ["y"], name="node_Add_8"),
    ]
    assert [slot.name for slot in slotted(graph(nodes)).slots] == ["node_MatMul_1", "net.0.up"]
