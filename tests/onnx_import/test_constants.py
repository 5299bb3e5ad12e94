"""Constants are seen as ONNX Runtime computes them."""

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import session

from converters.onnx.graph.constants import constant
from loraport.errors import LoraportError

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


def shaped(operator, opset, axes):
    """``Squeeze`` and ``Unsqueeze`` have their axes as an attribute before opset 13."""
    if opset < 13:
        return helper.make_node(operator, ["w"], ["y"], axes=axes), {}
    return helper.make_node(operator, ["w", "axes"], ["y"]), {"axes": np.array(axes)}


def sliced(opset, **given):
    if opset < 10:
        return helper.make_node("Slice", ["w"], ["y"], **given), {}
    inputs = [name if name in given else "" for name in ("starts", "ends", "axes", "steps")]
    arrays = {name: np.array(value) for name, value in given.items()}
    return helper.make_node("Slice", ["w", *inputs], ["y"]), arrays


def split(opset, sizes=(1, 2), axis=1, parts=2, **given):
    outputs = ["other", "y", "last"][:parts]
    if sizes is None:
        return helper.make_node("Split", ["w"], outputs, axis=axis, **given), {}
    if opset < 13:
        return helper.make_node("Split", ["w"], outputs, axis=axis, split=sizes), {}
    return helper.make_node("Split", ["w", "sizes"], outputs, axis=axis), {"sizes": np.array(sizes)}


FAR = np.iinfo(np.int64).max
MOVED = {  # opset, shape, node and its constants, whether it is the whole
    "squeeze": (21, (1, 4, 1, 3), shaped("Squeeze", 21, [0, -2]), True),
    "squeeze, old": (11, (1, 4, 1, 3), shaped("Squeeze", 11, [2]), True),
    "squeeze all": (21, (1, 4, 1, 3), (helper.make_node("Squeeze", ["w"], ["y"]), {}), True),
    "unsqueeze": (21, (4, 3), shaped("Unsqueeze", 21, [-1, 0]), True),
    "unsqueeze, old": (11, (4, 3), shaped("Unsqueeze", 11, [1]), True),
    "flatten": (21, (4, 3, 2), (helper.make_node("Flatten", ["w"], ["y"], axis=2), {}), True),
    "flatten, from the end": (
        21,
        (4, 3, 2),
        (helper.make_node("Flatten", ["w"], ["y"], axis=-2), {}),
        True,
    ),
    "slice": (21, (6, 5), sliced(21, starts=[1, -4], ends=[FAR, -1], axes=[1, 0]), False),
    "slice, without axes": (21, (6, 5), sliced(21, starts=[2, 1], ends=[5, 3]), False),
    "slice backwards": (
        21,
        (6, 5),
        sliced(21, starts=[-1], ends=[-FAR], axes=[-1], steps=[-2]),
        False,
    ),
    "slice, old": (9, (6, 5), sliced(9, starts=[1], ends=[4], axes=[1]), False),
    "split": (21, (4, 3), split(21), False),
    "split, old": (11, (4, 3), split(11), False),
    "split into equal parts": (11, (4, 6), split(11, None, -1, 3), False),
    "split with a rest": (21, (4, 5), split(21, None, 1, 2, num_outputs=2), False),
    "gather": (
        21,
        (4, 3, 5),
        (
            helper.make_node("Gather", ["w", "i"], ["y"], axis=-2),
            {"i": np.array([[-1, 0], [2, 1]])},
        ),
        False,
    ),
    "gather one": (
        21,
        (4, 3, 5),
        (helper.make_node("Gather", ["w", "i"], ["y"]), {"i": np.array(2)}),
        False,
    ),
    "cast": (
        21,
        (4, 3),
        (
            helper.make_node("CastLike", ["w", "like"], ["y"]),
            {"like": np.zeros((), np.float16)},
        ),
        True,
    ),
    "concat": (
        21,
        (4, 3),
        (
            helper.make_node("Concat", ["v", "w", "v"], ["y"], axis=-1),
            {"v": np.ones((4, 2), np.float32)},
        ),
        False,
    ),
}


@pytest.mark.parametrize("name", MOVED)
def test_constants_that_are_cast_moved_taken_apart_and_put_together(name):
    opset, shape, (node, arrays), whole = MOVED[name]
    weight = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    stored = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    kind = TensorProto.FLOAT16 if name == "cast" else TensorProto.FLOAT
    made = helper.make_tensor_value_info("y", kind, None)
    graph = helper.make_graph([node], "g", [], [made], [numpy_helper.from_array(weight, "w")])
    graph.initializer.extend(stored)
    opsets = [helper.make_opsetid("", opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=4)
    found = constant(ir.from_proto(model).graph.outputs[0])
    expected = session(model).run(None, {})[0]
    assert (found.name, found.shape) == ("w" if whole else "y", expected.shape)
    np.testing.assert_array_equal(found.array(), expected)
    assert found.dtype == ir.DataType.from_numpy(expected.dtype)
    assert expected.shape != shape or expected.dtype != weight.dtype


@pytest.mark.parametrize("name", ["squeeze", "slice", "split", "concat", "gather"])
def test_what_an_input_of_the_graph_decides_is_no_constant(name):
    opset, shape, (node, arrays), _ = MOVED[name]
    inputs = [helper.make_tensor_value_info(n, TensorProto.INT64, [None]) for n in arrays]
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    weight = numpy_helper.from_array(np.ones(shape, np.float32), "w")
    graph = helper.make_graph([node], "g", inputs, [made], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    assert constant(ir.from_proto(model).graph.outputs[0]) is None


SIZED = {  # opset, ``Shape``'s attributes, ``ReduceProd``'s axes and whether they are an input
    "all but the last": (17, {"end": -1}, None, False),
    "two in the middle": (17, {"start": 1, "end": 3}, [0], False),
    "axes that are an input": (18, {"start": -2}, [-1], True),
    "old": (9, {}, None, False),
}


@pytest.mark.parametrize("keepdims", [0, 1])
@pytest.mark.parametrize("name", SIZED)
def test_weights_that_are_reshaped_by_sizes_of_their_own(name, keepdims):
    """As tf2onnx writes an einsum with a weight of more dimensions than two."""
    opset, ends, axes, as_input = SIZED[name]
    named = {} if axes is None or as_input else {"axes": axes}
    product = helper.make_node(
        "ReduceProd", ["sizes", "axes"][: 1 + as_input], ["n"], keepdims=keepdims, **named
    )
    nodes = [
        helper.make_node("Shape", ["w"], ["sizes"], **ends),
        product,
        helper.make_node("Reshape", ["n", "one"], ["ns"]),
        helper.make_node("Concat", ["ns", "rest"], ["shape"], axis=0),
        helper.make_node("Reshape", ["w", "shape"], ["y"]),
    ]
    weight = np.random.default_rng(0).standard_normal((2, 3, 5, 4)).astype(np.float32)
    arrays = {
        "w": weight,
        "one": np.array([1]),
        "rest": np.array([-1]),
        "axes": np.array(axes or [0]),
    }
    stored = [numpy_helper.from_array(array, key) for key, array in arrays.items()]
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    graph = helper.make_graph(nodes, "g", [], [made], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=4)
    found = constant(ir.from_proto(model).graph.outputs[0])
    expected = session(model).run(None, {})[0]
    assert (found.name, found.shape, found.quantized) == ("w", expected.shape, False)
    np.testing.assert_array_equal(found.array(), expected)
    assert expected.shape not in (weight.shape, weight.T.shape)
    nodes[0].input[0] = "x"  # the control: what a run gives decides
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [None] * 4)
    graph = helper.make_graph(nodes, "g", [x], [made], stored)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=4)
    assert constant(ir.from_proto(model).graph.outputs[0]) is None


IMPOSSIBLE = {
    "Split": ([[4, 2]], {"axis": 5}),
    "Slice": ([[0], [4], [7]], {}),
    "Slice of fewer ends": ([[0, 0], [4]], {}),
    "Slice by nothing": ([[0], [4], [1], [0]], {}),
    "Unsqueeze": ([[0, 0]], {}),
    "Transpose": ([], {"perm": [0, 3]}),
    "Concat": ([[1, 2, 3]], {"axis": 0}),
    "Gather": ([[0, 99]], {"axis": 1}),
    "Reshape": ([[5, -1]], {}),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_what_no_operator_can_compute_is_no_constant_or_is_told(name):
    """Such models, which ONNX Runtime refuses, ended in a traceback."""
    inputs, attributes = IMPOSSIBLE[name]
    weight = np.ones((ROWS, COLUMNS), np.float32)
    more = {f"c{number}": np.array(values, np.int64) for number, values in enumerate(inputs)}
    operator = name.split()[0]
    outputs = ["y", "z"] if operator == "Split" else ["y"]
    node = helper.make_node(operator, ["w", *more], outputs, **attributes)
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(array, key) for key, array in ({"w": weight} | more).items()]
    model = helper.make_model(helper.make_graph([node], "g", [], [made], stored), ir_version=10)
    with pytest.raises(Exception, match="ONNXRuntimeError"):
        session(model).run(None, {})
    found = constant(ir.from_proto(model).graph.outputs[0])
    if found is not None:
        with pytest.raises(LoraportError, match="expected operators that can compute it, got"):
            found.array()
