"""Who ran each node: told from the runtime's own profile, and a stray node is found."""

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from tiny_llm import TEXTS, tokenizer

from loraport.errors import LoraportError
from loraport.parity import placement as checks
from loraport.runtime import Runtime
from loraport.runtime.decoder import first_step_inputs, read_decoder
from loraport.runtime.placement import NodeRun, node_runs, read_profile, strays
from loraport.runtime.session import open_session

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


@pytest.fixture(scope="module")
def runtime(bundle):
    return Runtime(bundle, threads=1)


@pytest.fixture(scope="module")
def inputs(runtime):
    ids = tokenizer()(TEXTS[0])["input_ids"]
    return first_step_inputs(runtime, read_decoder(runtime.directory), ids)


def test_every_product_of_the_graph_is_seen(runtime, inputs):
    runs = node_runs(runtime, inputs, "a")
    graph = onnx.load(str(runtime.directory / "model.onnx"), load_external_data=False).graph
    slots = len(runtime.manifest.slots.inputs())
    products = [run for run in runs if "MatMul" in run.op_type or run.op_type == "Gemm"]
    assert len(products) >= slots  # A and B of every slot
    assert {run.provider for run in runs} == {CPU}
    assert all(run.computes for run in products)
    assert len(runs) > len(graph.node) / 2
    assert strays(runs, "cpu") == []
    assert set(products) <= set(strays(runs, "cuda"))


def test_the_check_names_what_strayed(runtime, inputs, monkeypatch):
    found = checks.placement(runtime, inputs, None)
    assert found.passed
    assert "on CPU" in found.detail
    runs = [NodeRun("/lm_head/MatMul", "MatMul", CPU, True), NodeRun("/x", "Add", CUDA, True)]
    monkeypatch.setattr(checks, "node_runs", lambda *_: [*runs, NodeRun("/s", "Shape", CPU, False)])
    monkeypatch.setattr(runtime, "provider", "cuda")
    found = checks.placement(runtime, inputs, None)
    assert not found.passed
    assert found.detail == "/lm_head/MatMul (MatMul) on CPUExecutionProvider"
    monkeypatch.setattr(checks, "node_runs", lambda *_: [])
    assert not checks.placement(runtime, inputs, None).passed  # no profile is no proof


def test_sizes_may_be_computed_anywhere(tmp_path):
    nodes = [
        helper.make_node("Shape", ["x"], ["sizes"], name="sizes"),
        helper.make_node("Cast", ["sizes"], ["numbers"], name="numbers", to=TensorProto.FLOAT),
        helper.make_node("ReduceProd", ["numbers"], ["count"], name="count", keepdims=0),
        helper.make_node("MatMul", ["x", "w"], ["h"], name="product"),
        helper.make_node("Div", ["h", "count"], ["y"], name="mean"),
    ]
    graph = helper.make_graph(
        nodes,
        "sizes",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3])],
        [numpy_helper.from_array(np.ones((4, 3), np.float32), "w")],
    )
    opsets = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    session = open_session(tmp_path / "m.onnx", profile=tmp_path / "profile")
    session.run(None, {"x": np.ones((2, 4), np.float32)})
    runs = read_profile(tmp_path / session.end_profiling())
    assert {run.name: run.computes for run in runs} == {
        "sizes": False, "numbers": False, "count": False, "product": True, "mean": True
    }  # fmt: skip


def test_an_unknown_adapter_is_refused(runtime, inputs):
    with pytest.raises(LoraportError, match="nobody"):
        node_runs(runtime, inputs, "nobody")
