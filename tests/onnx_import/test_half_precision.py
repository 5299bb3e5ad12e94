"""Graphs of float16 that ONNX Runtime's default session does not survive on a CPU."""

import signal
import subprocess
import sys

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from converters.onnx import add_adapters, first_golden
from converters.onnx.importing import ImportOptions, import_model
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.bundle.manifest import read_manifest
from loraport.parity.shipped import required_graph
from loraport.parity.tolerances import tolerance_for
from loraport.runtime import Runtime
from loraport.runtime.placement import node_runs

WEIGHT = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
X = np.random.default_rng(1).standard_normal((2, 5, 8)).astype(np.float32)


@pytest.fixture
def file(tmp_path):
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[1, 0, 2]),
        helper.make_node("MatMul", ["t", "layer.weight"], ["y"]),
    ]
    given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 8])
    made = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["length", "batch", 6])
    graph = helper.make_graph(
        nodes, "g", [given], [made], [numpy_helper.from_array(WEIGHT, "layer.weight")]
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    return tmp_path / "m.onnx"


@pytest.fixture
def bundle(file, tmp_path):
    import_model(file, tmp_path / "bundle", ImportOptions(precision="fp16"))
    return tmp_path / "bundle"


def test_the_default_session_ends_the_process(bundle):
    """What all this is for; where ONNX Runtime is mended, it can go."""
    code = "import onnxruntime, sys\nonnxruntime.InferenceSession(sys.argv[1])"
    command = [sys.executable, "-c", code, str(bundle / "model.onnx")]
    assert subprocess.run(command, capture_output=True).returncode == -signal.SIGSEGV


def test_it_runs_here_with_an_adapter(bundle):
    random = torch.Generator().manual_seed(0)
    a, b = (torch.randn(shape, generator=random) for shape in ((3, 8), (6, 3)))
    adapter = Adapter({"layer": LoraModule(ModuleKind.LINEAR, a, b, alpha=3)})
    add_adapters(bundle, {"a": adapter})
    runtime = Runtime(bundle)
    assert read_manifest(bundle).golden
    base = X.swapaxes(0, 1) @ WEIGHT
    update = X.swapaxes(0, 1) @ (b @ a).numpy().T
    got = runtime.run({"x": X})["y"], runtime.run({"x": X}, "a")["y"]
    np.testing.assert_allclose(got[0], base, atol=0.02)  # 11 bits, of sums up to 10
    np.testing.assert_allclose(got[1], base + update, atol=0.1)
    assert np.abs(update).max() > 1
    check = required_graph(runtime, {"x": X}, ["y"], ["a"], tolerance_for("fp16", "cpu"))
    assert check.passed, check.detail
    assert {run.name for run in node_runs(runtime, {"x": X}, "a")}


def test_other_programs_are_told(file, tmp_path):
    said = []
    for precision in ("fp16", "int8"):
        options = ImportOptions(precision=precision)
        import_model(file, tmp_path / precision, options, progress=said.append)
        assert sum("NchwcTransformer" in text for text in said) == 1


@pytest.mark.parametrize(("precision", "told"), [("fp16", True), (None, False)])
def test_a_session_in_halves_holds_its_weights_in_float32_too(
    precision, told, tmp_path, monkeypatch
):
    """Where that does not fit beside them, no golden outputs are recorded, and it is said."""
    size = 64
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["rows", size]) for n in "xy"]
    weight = numpy_helper.from_array(np.eye(size, dtype=np.float32), "fc.weight")
    node = helper.make_node("MatMul", ["x", "fc.weight"], ["y"])
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    stored = size * size * (2 if precision else 4)
    monkeypatch.setattr(first_golden, "free_memory", lambda: 2 * stored)
    said = []
    options = ImportOptions(precision=precision)
    import_model(tmp_path / "m.onnx", tmp_path / "out", options, progress=said.append)
    assert any("GB of memory are free" in text for text in said) is told
    assert bool(read_manifest(tmp_path / "out").golden) is not told


@pytest.mark.parametrize(
    ("kind", "precision"),
    [(TensorProto.FLOAT16, "fp16"), (TensorProto.BFLOAT16, "bf16"), (TensorProto.FLOAT, "fp32")],
)
def test_a_graph_of_halves_is_called_by_its_own(kind, precision, tmp_path):
    """Bounds and PyTorch's reference go by it: bfloat16's eight bits are not float16's eleven."""
    ends = [helper.make_tensor_value_info(n, kind, ["rows", 8]) for n in "xy"]
    weight = helper.make_tensor("fc.weight", kind, [8, 8], WEIGHT[:, :1].repeat(8, 1).ravel())
    node = helper.make_node("MatMul", ["x", "fc.weight"], ["y"])
    graph = helper.make_graph([node], "g", ends[:1], ends[1:], [weight])
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    import_model(tmp_path / "m.onnx", tmp_path / "out", ImportOptions())
    assert read_manifest(tmp_path / "out").precision == precision
