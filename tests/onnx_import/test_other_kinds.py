"""Graphs that take or give sequences and texts beside arrays of numbers."""

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from converters.onnx.exporters import quantizing, storing
from converters.onnx.importing import ImportOptions, import_model
from converters.onnx.packing.adding import add_adapters
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.bundle.golden import golden_reason, read_golden
from loraport.bundle.manifest import MODEL_FILE, read_manifest
from loraport.errors import LoraportError
from loraport.runtime import Runtime

FLOAT, TEXT = TensorProto.FLOAT, TensorProto.STRING
RANDOM = np.random.default_rng(0)
WEIGHT = RANDOM.standard_normal((5, 3)).astype(np.float32)
X = RANDOM.standard_normal((2, 5)).astype(np.float32)
LABELS = np.array(["low", "middle", "high"], dtype=object)


def classifier(path, *, outputs=("y", "label", "parts"), words=False):
    """Write ``y = x W``, its label as a text and both factors as a sequence; x may be of words."""
    given = helper.make_tensor_value_info("x", FLOAT, ["n", 5])
    nodes = [
        helper.make_node("MatMul", ["x", "layer.weight"], ["y"], name="/layer/MatMul"),
        helper.make_node("ArgMax", ["y"], ["best"], axis=1, keepdims=0),
        helper.make_node(
            "ArrayFeatureExtractor", ["labels", "best"], ["label"], domain="ai.onnx.ml"
        ),
        helper.make_node("SequenceConstruct", ["x", "y"], ["parts"]),
    ]
    if words:
        given = helper.make_tensor_value_info("words", TEXT, ["n", 5])
        numbers = {"keys_strings": ["a", "b"], "values_floats": [1.0, 2.0]}
        nodes.insert(
            0, helper.make_node("LabelEncoder", ["words"], ["x"], domain="ai.onnx.ml", **numbers)
        )
    kinds = {
        "y": helper.make_tensor_value_info("y", FLOAT, ["n", 3]),
        "label": helper.make_tensor_value_info("label", TEXT, None),
        "parts": helper.make_tensor_sequence_value_info("parts", FLOAT, None),
    }
    constants = [
        numpy_helper.from_array(WEIGHT, "layer.weight"),
        numpy_helper.from_array(LABELS, "labels"),
    ]
    graph = helper.make_graph(nodes, "g", [given], [kinds[name] for name in outputs], constants)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.ml", 3)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def adapter():
    a, b = (RANDOM.standard_normal(shape).astype(np.float32) for shape in ((2, 5), (3, 2)))
    lora = LoraModule(ModuleKind.LINEAR, torch.from_numpy(a), torch.from_numpy(b), alpha=2.0)
    return a, b, Adapter({"layer": lora})


def test_golden_cases_hold_the_outputs_that_are_numbers(tmp_path):
    out = tmp_path / "out"
    import_model(classifier(tmp_path / "m.onnx"), out, ImportOptions(inputs={"x": X}))
    a, b, lora = adapter()
    add_adapters(out, {"a": lora})
    manifest = read_manifest(out)
    weight = WEIGHT.astype(np.float64)
    expected = {"base": X @ weight, "adapter-a": X @ (weight + a.T.astype(np.float64) @ b.T)}
    assert np.abs(expected["base"] - expected["adapter-a"]).max() > 0.5
    assert manifest.golden.keys() == expected.keys()
    for case, values in expected.items():
        _, outputs = read_golden(out, manifest.golden[case])
        assert outputs.keys() == {"y"}
        np.testing.assert_allclose(outputs["y"], values, rtol=0, atol=1e-5)


def test_a_run_gives_texts_and_names_the_sequences(tmp_path):
    import_model(classifier(tmp_path / "m.onnx"), tmp_path / "out")
    runtime = Runtime(tmp_path / "out")
    got = runtime.run({"x": X}, outputs=["y", "label"])
    np.testing.assert_allclose(got["y"], X @ WEIGHT.astype(np.float64), rtol=0, atol=1e-5)
    assert got["label"].ravel().tolist() == LABELS[got["y"].argmax(1)].tolist()
    with pytest.raises(LoraportError) as stop:
        runtime.run({"x": X})
    assert str(stop.value).splitlines() == [
        "name the outputs wanted, without these, or use run_on_device",
        "  - parts: expected an output that is an array, got seq(tensor(float))",
    ]


@pytest.mark.parametrize(
    ("outputs", "words", "told"),
    [
        (("parts",), False, "parts: seq(tensor(float))"),
        (("label",), False, "label: tensor(string)"),
        (("y",), True, "words: tensor(string)"),
    ],
)
def test_without_numbers_there_are_slots_and_no_golden_cases(tmp_path, outputs, words, told):
    out = tmp_path / "out"
    import_model(classifier(tmp_path / "m.onnx", outputs=outputs, words=words), out)
    assert list(read_manifest(out).slots.modules()) == ["layer"]
    assert golden_reason(out) == f"golden cases hold arrays of numbers, got {told}"


def test_an_input_of_texts_is_told_what_to_do(tmp_path):
    import_model(classifier(tmp_path / "m.onnx", outputs=["y"], words=True), tmp_path / "out")
    with pytest.raises(LoraportError, match=r"words: .*string\), which cannot .*Session\.run, ad"):
        Runtime(tmp_path / "out").run({"words": np.array([list("abaab")])})


def test_sequences_that_a_precision_turns_into_halves_are_told(tmp_path, monkeypatch):
    """ONNX Runtime's converter casts arrays back to float32, and no sequences."""

    def in_this_process(source, out, precision):
        quantizing._QUANTIZERS[precision](source, out / MODEL_FILE)

    monkeypatch.setattr(storing, "quantize_graph", in_this_process)
    said = []
    file = classifier(tmp_path / "m.onnx")
    import_model(file, tmp_path / "out", ImportOptions(precision="fp16"), progress=said.append)
    assert "sequences of float16 now, where arrays stay float32: parts" in said
    kinds = {each.name: each.type for each in Runtime(tmp_path / "out").session.get_outputs()}
    assert kinds["parts"] == "seq(tensor(float16))"
    assert kinds["y"] == "tensor(float)"
