"""Weights that a loop only carries take slots in its body, as tf2onnx writes recurrent layers."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS, session

from converters.onnx.importing import ImportOptions, import_model
from loraport.bundle.manifest import read_manifest
from loraport.runtime.replay import replay_golden

FEATURES, STEPS = 5, 4
FLOAT, INT64, BOOL = TensorProto.FLOAT, TensorProto.INT64, TensorProto.BOOL
info = helper.make_tensor_value_info


def body(kind, changed):
    """``h' = tanh(h W)``; ``W`` is handed on, through an ``Identity`` or changed."""
    h, w = info("h", FLOAT, None), info("w", FLOAT, None)
    nodes = [
        helper.make_node("MatMul", ["h", "w"], ["p"], name="/step/MatMul"),
        helper.make_node("Tanh", ["p"], ["h_next"]),
        helper.make_node(*(("Neg" if changed else "Identity"), ["w"], ["w_next"])),
    ]
    ends = [info("h_next", FLOAT, None), info("w_next", FLOAT, None)]
    if kind == "Scan":
        nodes.append(helper.make_node("Add", ["x_t", "h_next"], ["y_t"]))
        rows = info("x_t", FLOAT, None)
        return helper.make_graph(nodes, "body", [h, w, rows], [*ends, info("y_t", FLOAT, None)])
    nodes.append(helper.make_node("Identity", ["go"], ["go_next"]))
    given = [info("i", INT64, []), info("go", BOOL, []), h, w]
    return helper.make_graph(nodes, "body", given, [info("go_next", BOOL, []), *ends])


def model(kind, changed=False, used_outside=True):
    """The first step outside of the loop, with the same weight, or none."""
    weight = np.random.default_rng(0).standard_normal((FEATURES, FEATURES)).astype(np.float32)
    constants = {"W": weight, "steps": np.array(STEPS), "true": np.array(True)}
    nodes = [helper.make_node("Identity", ["x"], ["first"])]
    if used_outside:
        nodes = [helper.make_node("MatMul", ["x", "W"], ["first"], name="/step/MatMul_0")]
    inputs = [info("x", FLOAT, ["rows", FEATURES])]
    if kind == "Loop":
        given, made = ["steps", "true", "first", "W"], ["y", "carried"]
    else:
        given, made = ["first", "W", "xs"], ["y", "carried", "all"]
        inputs.append(info("xs", FLOAT, [STEPS, "rows", FEATURES]))
    attributes = {"num_scan_inputs": 1} if kind == "Scan" else {}
    nodes.append(helper.make_node(kind, given, made, body=body(kind, changed), **attributes))
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    outputs = [info("y", FLOAT, ["rows", FEATURES]), info("carried", FLOAT, [FEATURES, FEATURES])]
    graph = helper.make_graph(nodes, "g", inputs, outputs, stored)
    return helper.make_model(graph, opset_imports=DOMAINS[:1], ir_version=10), weight


def expected(x, weight, *, outside):
    """Return the last state, in float64."""
    h = x.astype(np.float64) @ weight if outside else x.astype(np.float64)
    for _ in range(STEPS):
        h = np.tanh(h @ weight)
    return h


@pytest.mark.parametrize("kind", ["Loop", "Scan"])
@pytest.mark.parametrize("outside", [False, True])
def test_an_adapter_changes_every_step(tmp_path, kind, outside):
    made, weight = model(kind, used_outside=outside)
    onnx.save(made, tmp_path / "model.onnx")
    import_model(tmp_path / "model.onnx", tmp_path / "out")
    (slot,) = read_manifest(tmp_path / "out").slots.slots
    assert all(result.passed for result in replay_golden(tmp_path / "out"))
    random = np.random.default_rng(1)
    inputs = {"x": random.standard_normal((3, FEATURES)).astype(np.float32)}
    if kind == "Scan":
        inputs["xs"] = np.zeros((STEPS, 3, FEATURES), np.float32)
    a, b = (random.standard_normal(shape).astype(np.float32) for shape in ((5, 2), (2, 5)))
    adapter = {slot.input_a: a, slot.input_b: b}
    for name in ("model.onnx", "model.required.onnx"):
        file = tmp_path / "out" / name
        onnx.checker.check_model(str(file), full_check=True)
        y, carried = session(str(file)).run(None, {**inputs, **adapter})
        merged = weight + a.astype(np.float64) @ b
        np.testing.assert_allclose(y, expected(inputs["x"], merged, outside=outside), atol=1e-5)
        np.testing.assert_array_equal(carried, weight)
    base = session(str(tmp_path / "out" / "model.onnx")).run(None, inputs)[0]
    np.testing.assert_allclose(base, expected(inputs["x"], weight, outside=outside), atol=1e-5)
    assert np.abs(y - base).max() > 0.1


def test_what_a_step_changes_is_no_weight(tmp_path):
    made, weight = model("Loop", changed=True)
    onnx.save(made, tmp_path / "model.onnx")
    import_model(tmp_path / "model.onnx", tmp_path / "out")
    x = np.random.default_rng(1).standard_normal((3, FEATURES)).astype(np.float32)
    y, carried = session(str(tmp_path / "out" / "model.onnx")).run(None, {"x": x})
    h = x.astype(np.float64) @ weight
    for step in range(STEPS):
        h = np.tanh(h @ weight * (-1) ** step)
    np.testing.assert_allclose(y, h, atol=1e-5)
    np.testing.assert_array_equal(carried, weight * (-1) ** STEPS)


def two_loops():
    """Two recurrent layers, whose bodies have the same names inside, as tf2onnx writes them."""
    random = np.random.default_rng(2)
    weights = [random.standard_normal((FEATURES, FEATURES)).astype(np.float32) for _ in range(2)]
    constants = {"steps": np.array(STEPS), "true": np.array(True)}
    nodes, last = [], "x"
    for number, weight in enumerate(weights):
        constants[f"layer{number}/kernel"] = weight
        given = ["steps", "true", last, f"layer{number}/kernel"]
        last = f"h{number}"
        nodes.append(
            helper.make_node("Loop", given, [last, f"w{number}"], body=body("Loop", False))
        )
    stored = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    ends = [info("x", FLOAT, ["rows", FEATURES])], [info(last, FLOAT, ["rows", FEATURES])]
    graph = helper.make_graph(nodes, "g", *ends, stored)
    return helper.make_model(graph, opset_imports=DOMAINS[:1], ir_version=10), weights


@pytest.mark.parametrize(("precision", "atol"), [(None, 1e-5), ("fp16", 1e-2)])
def test_loops_with_the_same_names_inside_keep_their_modules(tmp_path, precision, atol):
    made, weights = two_loops()
    onnx.save(made, tmp_path / "model.onnx")
    import_model(tmp_path / "model.onnx", tmp_path / "out", ImportOptions(precision=precision))
    slots = read_manifest(tmp_path / "out").slots.slots
    assert [slot.name for slot in slots] == ["step.MatMul", "step.MatMul_1"]
    random = np.random.default_rng(1)
    x = random.standard_normal((3, FEATURES)).astype(np.float32)
    dtype = np.float32 if precision is None else np.float16
    adapter, wanted = {}, x
    for slot, weight in zip(slots, weights, strict=True):
        a, b = (random.standard_normal(shape).astype(dtype) for shape in ((5, 2), (2, 5)))
        adapter |= {slot.input_a: a, slot.input_b: b}
        wanted = expected(wanted, weight + a.astype(np.float64) @ b, outside=False)
    running = session(str(tmp_path / "out" / "model.onnx"))
    got = running.run(None, {"x": x, **adapter})[0]
    np.testing.assert_allclose(got, wanted, atol=atol)
    assert np.abs(got - running.run(None, {"x": x})[0]).max() > 10 * atol
