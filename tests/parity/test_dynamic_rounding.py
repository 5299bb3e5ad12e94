"""``verify`` tells what int8 kernels round in every run from weights and slots that are wrong."""

from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx_graphs import session

from converters.onnx import add_adapters
from converters.onnx.importing import ImportOptions, import_model
from converters.onnx.modules.graph_weights import load_graph_weights
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.parity import Sample, verify_bundle
from loraport.parity.check import Check
from loraport.parity.dynamic_rounding import judged_unrounded, without_rounded_activations
from loraport.parity.metrics import Comparison

OPSETS = [helper.make_opsetid("", 18)]
PARITY = "adapter a: onnxruntime = torch"


class Model(torch.nn.Module):
    """One layer, given numbers that are so large that roundings of 8 bits are more than 0.5."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.fc = torch.nn.Linear(24, 16, bias=False)

    def forward(self, x):
        return self.fc(x)


def adapter(seed):
    random = torch.Generator().manual_seed(seed)
    a, b = torch.randn(3, 24, generator=random), torch.randn(16, 3, generator=random)
    return Adapter({"fc": LoraModule(ModuleKind.LINEAR, a, b, alpha=3.0)})


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """An int8 bundle with an adapter, and its reference: the model with the graph's weights."""
    folder = tmp_path_factory.mktemp("int8")
    model = Model()
    weight = model.fc.weight.detach().numpy().T.copy()
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "fc.weight"], ["y"], name="/fc/MatMul")],
        "model",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 24])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["rows", 16])],
        [numpy_helper.from_array(weight, "fc.weight")],
    )
    onnx.save(helper.make_model(graph, opset_imports=OPSETS, ir_version=10), folder / "m.onnx")
    import_model(folder / "m.onnx", folder / "out", ImportOptions(precision="int8"))
    add_adapters(folder / "out", {"a": adapter(1)})
    assert load_graph_weights(folder / "out" / "model.onnx", model) == ["fc"]
    return folder / "out", model.eval()


def large():
    x = 300 * np.random.default_rng(0).standard_normal((5, 24)).astype(np.float32)
    return [Sample({"x": x}, {"x": x})]


def test_a_graph_without_rounded_activations_multiplies_by_its_own_weights(bundle):
    out, model = bundle
    found = without_rounded_activations(out / "model.onnx")
    inputs = dict(large()[0].session)
    expected = model(torch.from_numpy(inputs["x"])).detach().numpy()
    scale = np.abs(expected).max()
    np.testing.assert_allclose(session(found).run(None, inputs)[0], expected, atol=1e-6 * scale)
    rounded = session(str(out / "model.onnx")).run(None, inputs)[0]
    assert np.abs(rounded - expected).max() > 1e-3 * scale


def test_what_kernels_round_alone_is_no_failure(bundle):
    """``verify`` said that parity fails, as of every mixture of experts stored as int8."""
    out, model = bundle
    report = verify_bundle(out, model, {"a": adapter(1)}, samples=large())
    assert report.passed, [check for check in report.checks if not check.passed]
    (check,) = [each for each in report.checks if each.name == PARITY]
    assert check.comparison.max_abs > report.tolerance.max_abs
    assert check.detail.startswith("activations rounded to 8 bits by the kernel are the cause")


@pytest.mark.parametrize("wrong", ["adapter", "weight"])
def test_what_is_wrong_fails_still(bundle, wrong):
    out, model = bundle
    given = adapter(1)
    if wrong == "adapter":
        given = adapter(2)
    else:
        model = Model()
        model.fc.weight.data[0] += 0.01
    report = verify_bundle(out, model, {"a": given}, samples=large())
    (check,) = [each for each in report.checks if each.name == PARITY]
    assert not check.passed
    assert "not the only cause" in check.detail


def test_outputs_that_rounding_makes_absurd_fail():
    near = Comparison(max_abs=1e-5, relative=1e-6, kl=0.0, top1=1.0, positions=5)
    failed = Check(PARITY, False, comparison=replace(near, max_abs=9.0, relative=0.3, top1=0.9))
    assert judged_unrounded(failed, near).passed
    assert not judged_unrounded(failed, replace(near, relative=3e-3)).passed
    absurd = replace(failed, comparison=replace(near, relative=1.1))
    assert not judged_unrounded(absurd, near).passed
    assert not judged_unrounded(failed, replace(near, max_abs=float("nan"))).passed


def test_activations_that_something_else_reads_stay_rounded(tmp_path):
    """Nothing else reads floats where integers were. Control: the product alone."""

    def saved(extra):
        nodes = [
            helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
            helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),
            helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
            helper.make_node("Mul", ["f", "s"], ["y"]),
        ]
        given = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 4])]
        if extra:
            given.append(helper.make_tensor_value_info("q", TensorProto.UINT8, [2, 3]))
        graph = helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])],
            given,
            [numpy_helper.from_array(np.arange(12, dtype=np.int8).reshape(3, 4), "w")],
        )
        onnx.save(
            helper.make_model(graph, opset_imports=OPSETS, ir_version=10), tmp_path / "m.onnx"
        )
        return without_rounded_activations(tmp_path / "m.onnx")

    assert saved(extra=True) is None
    x = np.array([[0.1, -7, 2], [3, 4, 5]], np.float32)
    expected = x @ np.arange(12, dtype=np.float32).reshape(3, 4)
    got = session(saved(extra=False)).run(None, {"x": x})[0]
    np.testing.assert_allclose(got, expected, rtol=1e-6)
