"""Operators that scale their product: what an adapter adds to the weight is scaled, too."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS

IN, OUT, ROWS = 7, 5, 4
ALPHA, BETA = 0.25, 3.0


def graph(operator, transposed, opset=21, shape=(OUT,), computed=False):
    random = np.random.default_rng(0)
    weight = random.standard_normal((IN, OUT)).astype(np.float32)
    bias = random.standard_normal(shape).astype(np.float32)
    constants = {"layer.weight": weight.T.copy() if transposed else weight}
    attributes = {"alpha": ALPHA, "transB": int(transposed), "name": "/layer/product"}
    if operator == "Gemm":
        constants["layer.bias"] = bias
        attributes["beta"] = BETA
    else:
        attributes["domain"] = "com.microsoft"
    given = ["x", *constants]
    before = []
    if computed:
        before.append(helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=1))
        before.append(helper.make_node("Mul", ["layer.bias", "sum"], ["added"]))
        given[-1] = "added"
    node = helper.make_node(operator, given, ["y"], **attributes)
    made = helper.make_graph(
        [*before, node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", IN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", OUT])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    domains = [helper.make_opsetid("", opset), *DOMAINS[1:]]
    model = helper.make_model(made, opset_imports=domains, ir_version=10)
    added = BETA * bias.astype(np.float64) if operator == "Gemm" else 0.0
    return model, weight.astype(np.float64), added


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("operator", ["Gemm", "FusedMatMul"])
@pytest.mark.parametrize("strength", [False, True])
@pytest.mark.parametrize("opset", [9, 21])
def test_the_change_is_scaled_as_the_product_is(
    slotted, adapter, operator, transposed, strength, opset
):
    model, weight, added = graph(operator, transposed, opset)
    made = slotted(model, "lora", "gain", strength=strength)
    (slot,) = made.slots
    assert slot.name == "layer"
    random = np.random.default_rng(1)
    x = random.standard_normal((ROWS, IN)).astype(np.float32)
    base = made.run(x=x)[0]
    np.testing.assert_allclose(base, made.run_original(x=x)[0], atol=2e-6)  # its sum is apart
    plain = slotted(model, "lora", strength=strength)
    np.testing.assert_array_equal(plain.run(x=x)[0], plain.run_original(x=x)[0])
    tensors = adapter(slot)
    a, b = (tensors[f"{slot.name}.{role}"].astype(np.float64) for role in ("lora_A", "lora_B"))
    gain = random.uniform(0.5, 1.5, OUT).astype(np.float32) if slot.gain else np.float32(1)
    filled = {**tensors, **({slot.input_gain: gain} if slot.gain else {})}
    expected = ALPHA * x.astype(np.float64) @ (gain * weight + a @ b) + added
    got = made.run(x=x, **filled)[0]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    assert np.abs(got - base).max() > 0.1
    unscaled = ALPHA * x.astype(np.float64) @ (gain * weight) + x @ a @ b + added
    assert np.abs(got - unscaled).max() > 0.1
    if strength:
        half = made.run(x=x, lora_strength=np.array([0.5], np.float32), **filled)[0]
        np.testing.assert_allclose(half, (base + expected) / 2, atol=1e-5)


@pytest.mark.parametrize("shape", [(), (1,), (OUT,), (1, OUT), (ROWS, 1), (ROWS, OUT)])
@pytest.mark.parametrize("computed", [False, True])
@pytest.mark.parametrize("opset", [9, 21])
def test_whatever_a_gemm_adds_no_gain_scales(slotted, adapter, shape, computed, opset):
    model, weight, added = graph("Gemm", False, opset, shape, computed)
    made = slotted(model, "lora", "gain")
    (slot,) = made.slots
    random = np.random.default_rng(2)
    x = random.standard_normal((ROWS, IN)).astype(np.float32)
    gain = random.uniform(0.5, 1.5, OUT).astype(np.float32)
    tensors = adapter(slot)
    if computed:
        added = added * x.astype(np.float64).sum()
    change = tensors[slot.input_a].astype(np.float64) @ tensors[slot.input_b]
    expected = ALPHA * x.astype(np.float64) @ (gain * weight + change) + added
    got = made.run(x=x, **tensors, **{slot.input_gain: gain})[0]
    np.testing.assert_allclose(got, expected, atol=1e-5)
    scaled = ALPHA * x.astype(np.float64) @ (gain * weight + change) + gain * added
    assert np.abs(got - scaled).max() > 0.1
    np.testing.assert_allclose(made.run(x=x)[0], made.run_original(x=x)[0], atol=2e-6)


def test_rows_with_adapters_of_their_own(slotted, adapter):
    model, weight, added = graph("Gemm", transposed=False)
    made = slotted(model, "lora", per_row=True)
    (slot,) = made.slots
    x = np.random.default_rng(1).standard_normal((3, IN)).astype(np.float32)
    lanes = [adapter(slot, seed=seed) for seed in (5, 6)]
    stacked = {name: np.concatenate([lane[name] for lane in lanes]) for name in lanes[0]}
    got = made.run(x=x, adapter_ids=np.array([1, -1, 0]), **stacked)[0]
    for row, lane in ((0, lanes[1]), (1, None), (2, lanes[0])):
        change = 0 if lane is None else lane[slot.input_a].astype(np.float64) @ lane[slot.input_b]
        expected = ALPHA * x[row].astype(np.float64) @ (weight + change) + added
        np.testing.assert_allclose(got[row], expected, atol=1e-5)
    assert np.abs(got[1] - made.run(x=x)[0][1]).max() == 0
    assert np.abs(got[0] - made.run(x=x)[0][0]).max() > 0.05


def test_a_product_that_onnx_runtime_fused_with_its_scale_keeps_its_name(slotted, tmp_path):
    random = np.random.default_rng(0)
    weights = {name: random.standard_normal((IN, IN)).astype(np.float32) for name in ("q", "k")}
    nodes = [
        helper.make_node("MatMul", ["x", "q"], ["queries"], name="/attention/q_proj/MatMul"),
        helper.make_node("Mul", ["queries", "scale"], ["scaled"], name="/attention/Mul"),
        helper.make_node("MatMul", ["scaled", "k"], ["y"], name="/attention/k_proj/MatMul"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", IN])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", IN])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()]
        + [numpy_helper.from_array(np.float32(ALPHA), "scale")],
    )
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    model = helper.make_model(graph, opset_imports=DOMAINS[:1], ir_version=10)
    onnxruntime.InferenceSession(model.SerializeToString(), options)
    fused = onnx.load(tmp_path / "fused.onnx")
    assert "FusedMatMul" in {node.op_type for node in fused.graph.node}
    slots = slotted(fused, "lora").slots
    assert [slot.name for slot in slots] == ["attention.q_proj", "attention.k_proj"]
