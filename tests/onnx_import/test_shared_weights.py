"""A weight that layers share through ``Identity`` has one slot in every precision."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import DOMAINS, session

from converters.onnx.importing import ImportOptions, import_model
from loraport.bundle.manifest import read_manifest

SIZE = 64


@pytest.mark.parametrize("precision", [None, "int8", "int4", "fp16"])
def test_layers_that_share_a_weight(tmp_path, precision):
    random = np.random.default_rng(0)
    weight = (random.standard_normal((SIZE, SIZE)) / 8).astype(np.float32)
    nodes = [
        helper.make_node("Identity", ["onnx::MatMul_1"], ["onnx::MatMul_2"]),
        helper.make_node("MatMul", ["x", "onnx::MatMul_1"], ["a"], name="/layer/up/MatMul"),
        helper.make_node("Tanh", ["a"], ["b"]),
        helper.make_node("MatMul", ["b", "onnx::MatMul_2"], ["y"], name="/layer/up_1/MatMul"),
    ]
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", SIZE]) for n in "xy"]
    stored = [numpy_helper.from_array(weight, "onnx::MatMul_1")]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    model = helper.make_model(graph, opset_imports=DOMAINS[:1], ir_version=10)
    onnx.save(model, tmp_path / "model.onnx")
    import_model(tmp_path / "model.onnx", tmp_path / "out", ImportOptions(precision=precision))
    (slot,) = read_manifest(tmp_path / "out").slots.slots
    assert slot.name == "layer.up"
    x = random.standard_normal((3, SIZE)).astype(np.float32)
    dtype = np.float16 if precision == "fp16" else np.float32
    a, b = (random.standard_normal(s).astype(dtype) / 4 for s in ((SIZE, 2), (2, SIZE)))
    merged = weight + a.astype(np.float64) @ b
    expected = np.tanh(x.astype(np.float64) @ merged) @ merged
    running = session(str(tmp_path / "out" / "model.onnx"))
    got = running.run(None, {"x": x, slot.input_a: a, slot.input_b: b})[0]
    apart = {None: 1e-5, "fp16": 5e-3, "int8": 0.03, "int4": 0.2}[precision]
    assert np.linalg.norm(got - expected) < apart * np.linalg.norm(expected)
    base = running.run(None, {"x": x})[0]
    assert np.linalg.norm(base - expected) > 0.5 * np.linalg.norm(expected)
