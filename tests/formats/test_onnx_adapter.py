"""``.onnx_adapter`` files in ONNX Runtime's own adapter API."""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from peft_cases import load_with_peft, logits

from converters.formats.registry import read_adapter, write_adapter
from loraport.errors import LoraportError
from loraport.variants import lower


def _session(weight: np.ndarray, path: str) -> onnxruntime.InferenceSession:
    """One linear layer with a slot: y = x W' + (x A) B, A and B overridable zeros."""
    out, features = weight.shape
    slot = {
        f"{path}.lora_A": np.zeros((features, 1), np.float32),
        f"{path}.lora_B": np.zeros((1, out), np.float32),
    }
    shapes = {f"{path}.lora_A": [features, "r"], f"{path}.lora_B": ["r", out]}
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", features])]
    inputs += [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)
        for name, shape in shapes.items()
    ]
    initializers = [onnx.numpy_helper.from_array(np.ascontiguousarray(weight.T), "w")]
    initializers += [onnx.numpy_helper.from_array(zeros, name) for name, zeros in slot.items()]
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["base"]),
        helper.make_node("MatMul", ["x", f"{path}.lora_A"], ["down"]),
        helper.make_node("MatMul", ["down", f"{path}.lora_B"], ["up"]),
        helper.make_node("Add", ["base", "up"], ["y"]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", out])]
    graph = helper.make_graph(nodes, "layer", inputs, outputs, initializers)
    opset = [helper.make_opsetid("", 17)]
    model = helper.make_model(graph, opset_imports=opset, ir_version=8)
    return onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )


def test_onnx_runtime_computes_what_peft_computes(case_of, tmp_path) -> None:
    case = case_of("rslora_patterns")
    adapter = read_adapter(case.made.path)
    path = (
        "model.layers.0.mlp.down_proj" if "model.layers.0.mlp.down_proj" in adapter.modules else ""
    )
    module = adapter.modules[path]
    only = type(adapter)({path: module})
    write_adapter(only, tmp_path / "x.onnx_adapter", "onnx")
    layer = case.made.base.get_submodule(path)
    adapted = case.made.peft_model.base_model.model.get_submodule(path)
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    session = _session(layer.weight.detach().numpy(), path)
    options = onnxruntime.RunOptions()
    loaded = onnxruntime.LoraAdapter()
    loaded.Load(str(tmp_path / "x.onnx_adapter"))
    options.add_active_adapter(loaded)
    (got,) = session.run(None, {"x": x.numpy()}, options)
    (bare,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        np.testing.assert_allclose(got, adapted(x).numpy(), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(bare, layer(x).numpy(), rtol=1e-5, atol=1e-5)
    assert np.abs(got - bare).max() > 0.1


def test_the_file_stands_without_its_sidecar(case_of, tmp_path) -> None:
    adapter = read_adapter(case_of("plain").made.path)
    write_adapter(adapter, tmp_path / "x.onnx_adapter", "onnx")
    (tmp_path / "x.onnx_adapter.json").unlink()
    back = read_adapter(tmp_path / "x.onnx_adapter")
    for path, module in adapter.modules.items():
        expected = lower(module).delta(torch.float64)
        torch.testing.assert_close(
            lower(back.modules[path]).delta(torch.float64), expected, rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize(
    "text", ["", "[]", '{"modules": 3}', '{"modules": {"x": {}}}', "[" * 100_000, '{"a":1,"a":2}']
)
def test_a_damaged_sidecar_is_one_error(text, case_of, tmp_path) -> None:
    write_adapter(read_adapter(case_of("plain").made.path), tmp_path / "x", "onnx")
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(LoraportError, match=r"x\.json"):
        read_adapter(tmp_path / "x")


def test_a_sidecar_never_overrules_the_file(case_of, tmp_path) -> None:
    adapter = read_adapter(case_of("plain").made.path)
    write_adapter(adapter, tmp_path / "x", "onnx")
    sidecar = json.loads((tmp_path / "x.json").read_text())
    for entry in sidecar["modules"].values():
        entry["alpha"] = 1000.0
    (tmp_path / "x.json").write_text(json.dumps(sidecar))
    assert {module.scaling for module in read_adapter(tmp_path / "x").modules.values()} == {1.0}


def test_a_changed_file_is_refused(case_of, tmp_path) -> None:
    """The format has no checksum: ONNX Runtime itself would compute with the flipped byte."""
    write_adapter(read_adapter(case_of("plain").made.path), tmp_path / "x", "onnx")
    content = bytearray((tmp_path / "x").read_bytes())
    content[-100] ^= 1
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(LoraportError, match=r"expected the file that x\.json was written for"):
        read_adapter(tmp_path / "x")


def test_a_packed_slot_is_refused(tmp_path) -> None:
    """Bundles lay q, k and v side by side; which columns are whose only the bundle knows."""
    names = {"h.q_proj+k_proj.lora_A": np.ones((4, 2)), "h.q_proj+k_proj.lora_B": np.ones((2, 6))}
    values = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(array.astype(np.float32))
        for name, array in names.items()
    }
    adapter = onnxruntime.AdapterFormat()
    adapter.set_parameters(values)
    adapter.export_adapter(str(tmp_path / "x"))
    with pytest.raises(LoraportError, match="expected a slot of one module, got one of a packed"):
        read_adapter(tmp_path / "x")


@pytest.mark.parametrize("name", ["dora", "bias_lora_only", "lora_bias"])
def test_peft_and_back_computes_the_same(name, case_of, tmp_path) -> None:
    case = case_of(name)
    adapter = read_adapter(case.made.path)
    write_adapter(adapter, tmp_path / "x", "onnx", base=case.base)
    write_adapter(read_adapter(tmp_path / "x"), tmp_path / "peft", "peft")
    returned = load_with_peft(case.made.fresh_base(), tmp_path / "peft")
    expected = logits(load_with_peft(case.made.fresh_base(), case.made.path))
    torch.testing.assert_close(logits(returned), expected, rtol=1e-5, atol=2e-5)
    assert (logits(case.made.fresh_base()) - expected).abs().max() > 0.01


def test_a_gain_is_the_bases_and_onnx_runtime_computes_dora(case_of, tmp_path) -> None:
    """The slot's own formula in float64: y = gain (W x) + (x A) B."""
    case = case_of("dora")
    adapter = read_adapter(case.made.path)
    write_adapter(adapter, tmp_path / "x", "onnx", base=case.base)
    values = onnxruntime.AdapterFormat.read_adapter(str(tmp_path / "x")).get_parameters()
    for path in list(adapter.modules)[:3]:
        layer = case.made.base.get_submodule(path)
        x = torch.randn(5, layer.in_features, dtype=torch.float64)
        a, b, gain = (
            torch.from_numpy(values[f"{path}.lora_{part}"].numpy()).double()
            for part in ("A", "B", "gain")
        )
        got = gain * (x @ layer.weight.detach().double().T) + x @ a @ b
        wrapped = case.made.peft_model.base_model.model.get_submodule(path)
        with torch.no_grad():
            expected = wrapped(x.float()).double()
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
        assert (gain - 1).abs().max() > 1e-2


def test_dora_without_the_base_or_the_sidecar_is_refused(case_of, tmp_path) -> None:
    case = case_of("dora")
    adapter = read_adapter(case.made.path)
    with pytest.raises(LoraportError, match="the base, which a DoRA magnitude takes here"):
        write_adapter(adapter, tmp_path / "x", "onnx")
    write_adapter(adapter, tmp_path / "x", "onnx", base=case.base)
    (tmp_path / "x.json").unlink()
    with pytest.raises(LoraportError, match=r"DoRA's 32 magnitudes in the file's \.json, got none"):
        read_adapter(tmp_path / "x")
    assert not list(tmp_path.glob("x.*"))


def test_a_grouped_convolution_and_a_whole_matrix_are_refused(case_of, tmp_path) -> None:
    with pytest.raises(LoraportError, match="a convolution without groups, got 2 groups"):
        write_adapter(read_adapter(case_of("conv_grouped").made.path), tmp_path / "x", "onnx")
    with pytest.raises(LoraportError, match="a parameter saved in full"):
        write_adapter(read_adapter(case_of("modules_to_save").made.path), tmp_path / "x", "onnx")
    assert not list(tmp_path.iterdir())
