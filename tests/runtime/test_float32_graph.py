"""Graphs that round, computing in float32 instead."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx.helper import (
    make_function,
    make_graph,
    make_model,
    make_node,
    make_opsetid,
    make_tensor,
    make_tensor_value_info,
)

from loraport.runtime.float32_graph import in_float32
from loraport.runtime.session import open_session

HALF, SINGLE = onnx.TensorProto.FLOAT16, onnx.TensorProto.FLOAT
SIZE = 64


def graph_in_halves(file):
    """Write products, constants, casts, a function and two branches, everything in halves."""
    drawn = np.random.default_rng(0).standard_normal((3, SIZE, SIZE)).astype(np.float16)
    first, second, third = drawn
    function = make_function(
        "own",
        "Scaled",
        ["x"],
        ["y"],
        [
            make_node("Constant", [], ["c"], value=make_tensor("c", HALF, [], [0.3])),
            make_node("Mul", ["x", "c"], ["y"]),
        ],
        [make_opsetid("", 18)],
    )
    branches = {
        name: make_graph(
            [make_node(operator, ["scaled", weight], ["out"])],
            name,
            [],
            [make_tensor_value_info("out", HALF, ["rows", "columns"])],
            [onnx.numpy_helper.from_array(third, "w3")] if weight == "w3" else [],
        )
        for name, operator, weight in (
            ("then_branch", "MatMul", "w3"),
            ("else_branch", "Add", "w1"),
        )
    }
    nodes = [
        make_node("Cast", ["x"], ["half"], to=HALF),
        make_node("MatMul", ["half", "w1"], ["a"]),
        make_node("MatMul", ["a", "w2"], ["b"]),
        make_node("Shape", ["b"], ["shape"]),
        make_node("ConstantOfShape", ["shape"], ["c"], value=make_tensor("v", HALF, [1], [0.1])),
        make_node("Sum", ["b", "c", "given"], ["sum"]),
        make_node("Scaled", ["sum"], ["scaled"], domain="own"),
        make_node("If", ["yes"], ["y"], **branches),
    ]
    inputs = [
        make_tensor_value_info("x", SINGLE, ["rows", SIZE]),
        make_tensor_value_info("given", HALF, [1]),
        make_tensor_value_info("yes", onnx.TensorProto.BOOL, []),
    ]
    stored = [onnx.numpy_helper.from_array(w, n) for w, n in ((first, "w1"), (second, "w2"))]
    stored.append(make_tensor("given", HALF, [1], [0.7]))
    output = make_tensor_value_info("y", HALF, ["rows", "columns"])
    graph = make_graph(nodes, "g", inputs, [output], stored)
    opsets = [make_opsetid("", 18), make_opsetid("own", 1)]
    model = make_model(graph, opset_imports=opsets, ir_version=9, functions=[function])
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, file)
    return drawn.astype(np.float64)


@pytest.mark.parametrize("yes", [True, False])
@pytest.mark.parametrize("given", [None, 2.5])
def test_a_graph_in_halves_computes_in_float32(yes, given, tmp_path):
    first, second, third = graph_in_halves(tmp_path / "m.onnx")
    wide = in_float32(tmp_path / "m.onnx")
    x = np.random.default_rng(1).standard_normal((SIZE, SIZE)).astype(np.float32)
    feeds = {"x": x, "yes": np.array(yes)}
    if given is not None:  # inputs keep their types, and defaults their meaning
        feeds["given"] = np.array([given], np.float16)
    own, got = (
        onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for graph in (str(tmp_path / "m.onnx"), wide)
    )
    tenth, third_of_one, default = (np.float64(np.float16(value)) for value in (0.1, 0.3, 0.7))
    added = default if given is None else given
    scaled = (x.astype(np.float64) @ first @ second + tenth + added) * third_of_one
    expected = scaled @ third if yes else scaled + first
    assert (own.dtype, got.dtype) == (np.float16, np.float32)
    size = np.abs(expected).max()
    np.testing.assert_allclose(got, expected, rtol=0, atol=2e-6 * size)
    assert np.abs(own - expected).max() > 1e-4 * size  # the control


def test_a_graph_in_float32_is_left_alone(tmp_path):
    graph = make_graph(
        [make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [make_tensor_value_info("x", SINGLE, [2, 2])],
        [make_tensor_value_info("y", SINGLE, [2, 2])],
        [onnx.numpy_helper.from_array(np.eye(2, dtype=np.float32), "w")],
    )
    onnx.save(make_model(graph, opset_imports=[make_opsetid("", 18)]), tmp_path / "m.onnx")
    assert in_float32(tmp_path / "m.onnx") is None


def test_a_constant_in_a_data_file_stays_there(tmp_path):
    weight = np.random.default_rng(0).standard_normal((SIZE, SIZE)).astype(np.float16)
    stored = onnx.numpy_helper.from_array(weight, "w")
    (tmp_path / "w.bin").write_bytes(stored.raw_data)
    onnx.external_data_helper.set_external_data(stored, "w.bin")
    stored.ClearField("raw_data")
    ends = [make_tensor_value_info(name, HALF, ["rows", SIZE]) for name in "xy"]
    nodes = [
        make_node("Constant", [], ["w"], value=stored),
        make_node("MatMul", ["x", "w"], ["y"]),
    ]
    model = make_model(
        make_graph(nodes, "g", ends[:1], ends[1:]), opset_imports=[make_opsetid("", 18)]
    )
    model.ir_version = 9
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    x = np.random.default_rng(1).standard_normal((3, SIZE)).astype(np.float16)
    wide = in_float32(tmp_path / "m.onnx")
    assert len(wide) < SIZE * SIZE
    got = open_session(tmp_path / "m.onnx", graph=wide).run(None, {"x": x})[0]
    own = open_session(tmp_path / "m.onnx").run(None, {"x": x})[0]
    expected = x.astype(np.float64) @ weight.astype(np.float64)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4)
    assert np.abs(own - expected).max() > 2e-3  # the control


@pytest.mark.parametrize("made", [True, False])
def test_a_branch_may_give_what_is_stored(made, tmp_path):
    """As it does where a constant is all that is left of it."""
    given = make_tensor("c", HALF, [2], [0.3, 0.7])
    out = [make_tensor_value_info("c", HALF, [2])]
    constant = [make_node("Constant", [], ["c"], value=given)]
    kept = (
        make_graph(constant, "kept", [], out) if made else make_graph([], "kept", [], out, [given])
    )
    negative = make_tensor_value_info("n", HALF, [2])
    other = make_graph([make_node("Neg", ["x"], ["n"])], "other", [], [negative])
    nodes = [
        make_node("If", ["yes"], ["a"], then_branch=kept, else_branch=other),
        make_node("Mul", ["a", "x"], ["y"]),
    ]
    inputs = [
        make_tensor_value_info("x", HALF, [2]),
        make_tensor_value_info("yes", onnx.TensorProto.BOOL, []),
    ]
    graph = make_graph(nodes, "g", inputs, [make_tensor_value_info("y", HALF, [2])])
    model = make_model(graph, opset_imports=[make_opsetid("", 18)], ir_version=9)
    onnx.save(model, tmp_path / "m.onnx")
    x, c = np.array([0.1, 3], np.float16), np.array([0.3, 0.7], np.float16)
    own, wide = (
        [session.run(None, {"x": x, "yes": np.array(yes)})[0] for yes in (True, False)]
        for session in (
            open_session(tmp_path / "m.onnx"),
            open_session(tmp_path / "m.onnx", graph=in_float32(tmp_path / "m.onnx")),
        )
    )
    x, c = x.astype(np.float64), c.astype(np.float64)
    np.testing.assert_allclose(wide, [c * x, -x * x], rtol=1e-6)
    assert np.abs(own - np.array([c * x, -x * x])).max() > 1e-4  # the control
