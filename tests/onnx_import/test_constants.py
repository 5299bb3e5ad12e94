"""Constants are seen as ONNX Runtime computes them."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import session

from converters.onnx.graph.constants import constant

ROWS, COLUMNS = 6, 4


@pytest.mark.parametrize("scales", ["one", "rows", "columns", "blocks"])
@pytest.mark.parametrize("kind", [TensorProto.UINT8, TensorProto.INT8, TensorProto.INT4, None])
def test_floats_that_are_rounded_and_dequantized(scales, kind):
    random = np.random.default_rng(0)
    weight = random.standard_normal((ROWS, COLUMNS)).astype(np.float32)
    weight[0, 0], weight[1, 1] = 1e4, -1e4  # outside of what the integers reach
    shape = {"one": (), "rows": (ROWS,), "columns": (COLUMNS,), "blocks": (2, COLUMNS)}[scales]
    scale = random.uniform(0.02, 0.3, shape).astype(np.float32)
    constants = [numpy_helper.from_array(weight, "w"), numpy_helper.from_array(scale, "s")]
    given = ["s"]
    if kind is not None:
        zeros = random.integers(0, 7, shape)
        constants.append(helper.make_tensor("z", kind, shape, zeros.ravel().tolist()))
        given.append("z")
    attributes = {"axis": 0 if scales in ("rows", "blocks") else 1}
    if scales == "blocks":
        attributes["block_size"] = 3
    nodes = [
        helper.make_node("QuantizeLinear", ["w", *given], ["q"], **attributes),
        helper.make_node("DequantizeLinear", ["q", *given], ["y"], **attributes),
    ]
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, COLUMNS])
    graph = helper.make_graph(nodes, "g", [], [made], constants)
    opsets = [helper.make_opsetid("", 21)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    onnx.checker.check_model(model)
    found = constant(ir.from_proto(model).graph[1].outputs[0])
    assert (found.name, found.shape, found.quantized) == ("w", (ROWS, COLUMNS), True)
    expected = session(model).run(None, {})[0]
    np.testing.assert_array_equal(found.array(), expected)
    assert np.abs(expected - weight).max() > 1e3


def chain_of(operators):
    """A matrix behind as many operators, as onnx-ir sees the last one's output."""
    nodes, value = [], "w"
    for number, (operator, attributes) in enumerate(operators):
        nodes.append(helper.make_node(operator, [value], [f"v{number}"], **attributes))
        value = f"v{number}"
    made = helper.make_tensor_value_info(value, TensorProto.FLOAT, None)
    weight = np.random.default_rng(0).standard_normal((ROWS, COLUMNS)).astype(np.float32)
    graph = helper.make_graph(nodes, "g", [], [made], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    return ir.from_proto(model).graph.outputs[0], weight


def test_copies_of_copies_are_the_constant_however_many():
    value, weight = chain_of([("Identity", {})] * 5000 + [("Transpose", {})])
    np.testing.assert_array_equal(constant(value).array(), weight.T)


def test_more_operators_than_any_exporter_writes_are_no_constant():
    value, weight = chain_of([("Transpose", {})] * 50)
    np.testing.assert_array_equal(constant(value).array(), weight)
    value, _ = chain_of([("Transpose", {})] * 5000)
    assert constant(value) is None


@pytest.mark.parametrize(("times", "is_constant"), [(3, True), (40, False)])
def test_scales_of_scales_of_scales(times, is_constant):
    """Each is looked at once or not at all: forty would be a million million looks."""
    constants = [numpy_helper.from_array(np.array(3, np.uint8), "q")]
    constants.append(numpy_helper.from_array(np.array(0.5, np.float32), "s0"))
    nodes = []
    for number in range(times):
        given = ["q", f"s{number}", "q"] if number == 0 else [f"q{number}", f"s{number}"]
        if number:
            nodes.append(helper.make_node("QuantizeLinear", [f"s{number}"] * 2, [f"q{number}"]))
        nodes.append(helper.make_node("DequantizeLinear", given, [f"s{number + 1}"]))
    made = helper.make_tensor_value_info(f"s{times}", TensorProto.FLOAT, [])
    graph = helper.make_graph(nodes, "g", [], [made], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    found = constant(ir.from_proto(model).graph.outputs[0])
    assert (found is not None) is is_constant


@pytest.mark.parametrize("scales", [(), (ROWS, 1), (1, COLUMNS), (COLUMNS,)])
@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_integers_that_are_cast_centred_and_scaled(scales, first, dtype):
    """What stands for ``DequantizeLinear`` in graphs for runtimes that lack it."""
    random = np.random.default_rng(0)
    constants = {
        "w": random.integers(0, 256, (ROWS, COLUMNS), np.uint8),
        "z": random.integers(100, 156, scales).astype(dtype),
        "s": random.uniform(0.02, 0.3, scales).astype(dtype),
    }
    element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    nodes = [
        helper.make_node("Cast", ["w"], ["f"], to=element),
        helper.make_node("Sub", ["f", "z"], ["c"]),
        helper.make_node("Mul", ["s", "c"] if first else ["c", "s"], ["m"]),
        helper.make_node("Transpose", ["m"], ["y"]),
    ]
    model = model_of(nodes, constants, element)
    found = constant(ir.from_proto(model).graph.outputs[0])
    assert (found.name, found.shape, found.quantized) == ("w", (COLUMNS, ROWS), True)
    expected = session(model).run(None, {})[0]
    assert found.array().dtype == expected.dtype
    np.testing.assert_array_equal(found.array(), expected)
    assert (expected != constants["w"].T).any()


@pytest.mark.parametrize(
    ("weight", "scale"),
    [
        (np.ones((ROWS, COLUMNS), np.float32), np.ones(1, np.float32)),  # nothing was rounded
        (np.ones((1, COLUMNS), np.int8), np.ones((ROWS, 1), np.float32)),  # the scale is larger
        (np.ones(COLUMNS, np.int8), np.ones((1, 1), np.float32)),
    ],
)
def test_other_products_are_no_rounded_weights(weight, scale):
    nodes = [
        helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "s"], ["y"]),
    ]
    model = model_of(nodes, {"w": weight, "s": scale}, TensorProto.FLOAT)
    assert constant(ir.from_proto(model).graph.outputs[0]) is None


def model_of(nodes, constants, element):
    made = helper.make_tensor_value_info("y", element, None)
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "g", [], [made], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
