"""Golden cases: bounds that healthy bundles keep, and exchanged adapters do not."""

import shutil
import weakref
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from safetensors.numpy import save_file

from converters.onnx import add_adapters
from converters.onnx.importing import ImportOptions, import_model
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.bundle.golden import read_golden
from loraport.bundle.manifest import read_manifest, write_manifest
from loraport.runtime import Runtime
from loraport.runtime.recording import write_base_golden
from loraport.runtime.replay import replay

WIDE = 1e6  # a tolerance that says nothing


def passed(runtime):
    runtime.manifest = replace(runtime.manifest, tolerance=WIDE)
    return {result.name: result.passed for result in replay(runtime)}


def test_an_adapter_must_change_the_base_as_its_golden_outputs_do(own_bundle):
    runtime = Runtime(own_bundle, threads=1)
    names = {"base", "adapter-a", "adapter-b", "blend"}
    assert passed(runtime) == dict.fromkeys(names, True)
    golden = own_bundle / "golden"
    shutil.move(golden / "adapter-a.safetensors", golden / "kept")
    shutil.move(golden / "adapter-b.safetensors", golden / "adapter-a.safetensors")
    shutil.move(golden / "kept", golden / "adapter-b.safetensors")
    assert passed(runtime) == {**dict.fromkeys(names, True), "adapter-a": False, "adapter-b": False}


def test_an_adapter_that_changes_nothing_is_not_its_golden_outputs(own_bundle):
    golden = own_bundle / "golden"
    runtime = Runtime(own_bundle, threads=1)
    packed = {name: np.zeros_like(array) for name, array in runtime._read("a").items()}
    runtime._packed["a"] = packed
    assert passed(runtime)["adapter-a"] is False
    # Where the golden outputs are the base's too, nothing is as it should be.
    shutil.copyfile(golden / "base.safetensors", golden / "adapter-a.safetensors")
    assert passed(runtime)["adapter-a"] is True


def test_a_case_of_another_shape_than_the_bases_fails(own_bundle):
    """Somebody's own case, with other inputs, cannot be told to change the base as it should."""
    runtime = Runtime(own_bundle, threads=1)
    file = own_bundle / "golden" / "adapter-a.safetensors"
    inputs, _ = read_golden(own_bundle, runtime.manifest.golden["base"])
    shorter = {name: array[..., :3] for name, array in inputs.items() if array.ndim == 2}
    cut = {**inputs, **shorter}
    outputs = runtime.run(cut, "a", ["logits"])
    arrays = {f"input.{name}": np.ascontiguousarray(array) for name, array in cut.items()}
    save_file({**arrays, "output.logits": outputs["logits"]}, file)
    found = passed(runtime)
    assert found.pop("adapter-a") is False
    assert all(found.values())


def product(size, file, dtype=np.float32):
    """Write one product of 64 columns whose weights are so large."""
    weight = (np.random.default_rng(0).standard_normal((64, 64)) * size).astype(dtype)
    make = onnx.helper
    elements = make.np_dtype_to_tensor_dtype(weight.dtype)
    ends = [make.make_tensor_value_info(n, elements, ["rows", 64]) for n in "xy"]
    stored = [onnx.numpy_helper.from_array(weight, "fc.weight")]
    nodes = [make.make_node("MatMul", ["x", "fc.weight"], ["y"], name="/fc/MatMul")]
    graph = make.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    onnx.save(make.make_model(graph, opset_imports=[make.make_opsetid("", 18)], ir_version=9), file)


@pytest.mark.parametrize(("size", "widened"), [(100, True), (0.1, False)])
def test_what_kernels_round_is_measured_and_allowed(size, widened, tmp_path):
    product(size, tmp_path / "m.onnx")
    bundle = tmp_path / "out"
    import_model(tmp_path / "m.onnx", bundle, ImportOptions(precision="int4"))
    manifest = read_manifest(bundle)
    inputs, golden = read_golden(bundle, manifest.golden["base"])
    exact = Runtime(bundle, threads=1, float32_activations=True).run(inputs)
    apart = np.abs(exact["y"].astype(np.float64) - golden["y"]).max()
    assert apart > 0
    if widened:
        assert apart <= manifest.tolerance < apart + 0.1 + 1e-9
        wide = max(3.0, manifest.tolerance)
        assert manifest.tolerances == dict.fromkeys(("wasm", "webgpu"), wide)
    else:
        assert (manifest.tolerance, manifest.tolerances["wasm"]) == (1.0, 3.0)
    assert all(result.passed for result in replay(Runtime(bundle, threads=1)))
    assert add_adapters(bundle, {}).tolerance == manifest.tolerance  # nothing new is measured


@pytest.mark.parametrize(("size", "widened"), [(100, True), (0.1, False)])
def test_what_halves_round_is_measured_and_allowed(size, widened, tmp_path):
    product(size, tmp_path / "m.onnx", np.float16)
    bundle = tmp_path / "out"
    import_model(tmp_path / "m.onnx", bundle, ImportOptions())
    manifest = read_manifest(bundle)
    inputs, golden = read_golden(bundle, manifest.golden["base"])
    weight = onnx.numpy_helper.to_array(onnx.load(tmp_path / "m.onnx").graph.initializer[0])
    expected = inputs["x"].astype(np.float64) @ weight.astype(np.float64)
    apart = np.abs(expected - golden["y"]).max()
    assert apart > 0
    if widened:
        assert apart - 1e-3 <= manifest.tolerance < apart + 0.1 + 1e-3
    else:
        assert (manifest.precision, manifest.tolerance) == ("fp16", 0.1)
    assert all(result.passed for result in replay(Runtime(bundle, threads=1)))


def test_the_bundle_is_closed_before_its_graph_in_float32_is_opened(tmp_path, monkeypatch):
    """A graph in halves takes three times its size open, for each that is open."""
    product(0.1, tmp_path / "m.onnx", np.float16)
    bundle = tmp_path / "out"
    import_model(tmp_path / "m.onnx", bundle, ImportOptions())
    inputs = read_golden(bundle, read_manifest(bundle).golden["base"])[0]
    opened, open_then = [], []

    def watched(*arguments, **named):
        open_then.append(sum(session() is not None for session in opened))
        runtime = Runtime(*arguments, **named)
        opened.append(weakref.ref(runtime.session))
        return runtime

    monkeypatch.setattr("loraport.runtime.recording.Runtime", watched)
    write_base_golden(bundle, lambda runtime: inputs if runtime.directory == bundle else {})
    assert open_then == [0, 0]


def test_what_infinite_outputs_round_is_not_measured(tmp_path):
    make = onnx.helper
    half = onnx.TensorProto.FLOAT16
    product(0.1, tmp_path / "m.onnx", np.float16)
    model = onnx.load(tmp_path / "m.onnx")
    model.graph.node.append(make.make_node("Div", ["y", "zero"], ["z"]))
    model.graph.initializer.append(make.make_tensor("zero", half, [], [0.0]))
    model.graph.output.append(make.make_tensor_value_info("z", half, ["rows", 64]))
    onnx.save(model, tmp_path / "m.onnx")
    import_model(tmp_path / "m.onnx", tmp_path / "out", ImportOptions())
    manifest = read_manifest(tmp_path / "out")
    assert np.isinf(read_golden(tmp_path / "out", manifest.golden["base"])[1]["z"]).any()
    assert manifest.tolerance == 0.1


def test_no_case_may_be_taken_for_another(tmp_path):
    """What is allowed is less than half of what tells an adapter's outputs from the base's."""
    product(100, tmp_path / "m.onnx")
    bundle = tmp_path / "out"
    import_model(tmp_path / "m.onnx", bundle, ImportOptions(precision="int4"))
    manifest = read_manifest(bundle)
    a, b = torch.randn(2, 64), torch.randn(64, 2)
    inputs, base = read_golden(bundle, manifest.golden["base"])
    effect = np.abs(inputs["x"] @ (b @ a).numpy().T).max()
    wide = manifest.tolerance
    # As it was before the rounding of the base was measured, and an adapter of half its size.
    write_manifest(replace(manifest, tolerance=1e-3), bundle)
    module = LoraModule(ModuleKind.LINEAR, a, b * (wide / effect), alpha=2)
    add_adapters(bundle, {"a": Adapter({"fc": module})})
    manifest = read_manifest(bundle)
    adapted = read_golden(bundle, manifest.golden["adapter-a"])[1]
    apart = np.abs(adapted["y"] - base["y"]).max()
    assert apart / 2 < wide - 0.1  # the control: the rounding alone would be allowed more
    assert manifest.tolerance < apart / 2 <= manifest.tolerance + 0.1 + 1e-6
