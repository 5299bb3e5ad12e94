"""Variants in models that other tools exported: TorchScript's graphs and 8-bit ones."""

import logging
import warnings

import numpy as np
import onnx
import pytest
import torch
from command_line import command
from peft_cases import Case, ConvNet, bert, make_case

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters
from converters.onnx.importing import ImportOptions, import_model
from converters.onnx.slots.inserting import SlotOptions
from loraport.adapter import Adapter, Replacement
from loraport.bundle.manifest import read_manifest
from loraport.errors import LoraportError
from loraport.runtime import Runtime

CLOSE = {"rtol": 1e-4, "atol": 5e-5}  # float32 sums through two layers
ALL = SlotOptions(("lora", "gain", "bias", "embedding", "conv"))
IDS = np.random.default_rng(0).integers(1, 17, (2, 8))
CONVS = ["conv1d", "conv2d", "pointwise"]
ADAPTERS = {
    "conv": (ConvNet, {"target_modules": [*CONVS, "head"], "r": 4}),
    "conv_dora": (ConvNet, {"target_modules": [*CONVS, "head"], "r": 4, "use_dora": True}),
    "conv_bias": (ConvNet, {"target_modules": ["conv2d", "head"], "r": 4, "lora_bias": True}),
    "conv_embedding": (ConvNet, {"target_modules": ["embed"], "r": 4, "use_dora": True}),
    "conv_grouped": (ConvNet, {"target_modules": ["grouped"], "r": 4}),
    "bert_dora": (bert, {"target_modules": ["query", "dense", "classifier"], "use_dora": True}),
    "bert_bias": (bert, {"target_modules": ["value", "dense"], "lora_bias": True}),
    "bert_biases": (bert, {"target_modules": ["value", "dense"], "bias": "lora_only"}),
    "bert_saved": (bert, {"target_modules": ["query"], "modules_to_save": ["classifier"]}),
}


@pytest.fixture(scope="module")
def bases():
    found = {}
    for make in (ConvNet, bert):
        torch.manual_seed(0)
        model = make().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("bias"):
                    parameter.normal_(0, 0.1)
        found[make] = model
    return found


@pytest.fixture(scope="module")
def graphs(bases, tmp_path_factory):
    found = {}
    for make, model in bases.items():
        out = tmp_path_factory.mktemp("graph") / "model.onnx"
        if make is bert:
            model.config._attn_implementation = "eager"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(
                model,
                (),
                out,
                kwargs={"input_ids": torch.from_numpy(IDS)},
                input_names=["input_ids"],
                output_names=["logits"],
                dynamic_axes={"input_ids": {0: "batch", 1: "sequence"}},
                dynamo=False,
            )
        found[make] = out
    return found


def outputs(model):
    with torch.no_grad():
        result = model.eval()(input_ids=torch.from_numpy(IDS))
    return (result if isinstance(result, torch.Tensor) else result.logits).numpy()


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_torchscript_graph_equals_peft(name, bases, graphs, tmp_path):
    make, options = ADAPTERS[name]
    made = make_case(Case(make, options), tmp_path / "a", base=bases[make])
    slots = ALL
    if name == "bert_saved":
        slots = SlotOptions(replace=("classifier",))
    import_model(graphs[make], tmp_path / "out", ImportOptions(slots=slots))
    add_adapters(tmp_path / "out", {"a": read_adapter(made.path)})
    runtime = Runtime(tmp_path / "out", threads=1)
    feeds = {"input_ids": IDS}
    base, expected = outputs(made.base), outputs(made.peft_model)
    np.testing.assert_allclose(runtime.run(feeds)["logits"], base, **CLOSE)
    np.testing.assert_allclose(runtime.run(feeds, "a")["logits"], expected, **CLOSE)
    assert np.abs(base - expected).max() > 100 * CLOSE["atol"]


def test_dora_on_8_bit_weights_takes_the_bases_norms(bases, graphs, tmp_path):
    from onnxruntime.quantization import QuantType, quantize_dynamic

    make, options = ADAPTERS["bert_dora"]
    made = make_case(Case(make, options), tmp_path / "a", base=bases[make])
    made.base.save_pretrained(tmp_path / "base")
    logging.disable(logging.WARNING)
    quantize_dynamic(graphs[make], tmp_path / "int8.onnx", weight_type=QuantType.QInt8)
    logging.disable(logging.NOTSET)
    import_model(tmp_path / "int8.onnx", tmp_path / "out", ImportOptions(slots=ALL))
    adapter = read_adapter(made.path)
    with pytest.raises(LoraportError, match="give --base with the model that the bundle was"):
        add_adapters(tmp_path / "out", {"a": adapter})
    add_adapters(tmp_path / "out", {"a": adapter}, base=str(tmp_path / "base"))
    runtime = Runtime(tmp_path / "out", threads=1)
    feeds = {"input_ids": IDS}
    moved = runtime.run(feeds, "a")["logits"] - runtime.run(feeds)["logits"]
    wanted = outputs(made.peft_model) - outputs(made.base)
    # Weights and activations are rounded to 8 bits in every layer.
    assert np.linalg.norm(moved - wanted) < 0.25 * np.linalg.norm(wanted)


@pytest.mark.parametrize("written", [["--replace", "fc.bias, head"], ["fc.bias", "head"]])
def test_whole_parameters_are_given_one_by_one_or_as_a_list(written, tmp_path):
    """A list was one name, of which there was no parameter."""
    make, numbers = onnx.helper, np.random.default_rng(0)
    sizes = {"fc.weight": (5, 3), "fc.bias": (5,), "head.weight": (2, 5), "head.bias": (2,)}
    drawn = [{name: numbers.standard_normal(size) for name, size in sizes.items()} for _ in "ab"]
    base, saved = ({k: v.astype(np.float32) for k, v in arrays.items()} for arrays in drawn)
    nodes = [
        make.make_node("Gemm", ["x", "fc.weight", "fc.bias"], ["h"], transB=1),
        make.make_node("Gemm", ["h", "head.weight", "head.bias"], ["y"], transB=1),
    ]
    kind = onnx.TensorProto.FLOAT
    ends = [
        make.make_tensor_value_info(n, kind, ["rows", size]) for n, size in (("x", 3), ("y", 2))
    ]
    stored = [onnx.numpy_helper.from_array(array, name) for name, array in base.items()]
    graph = make.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    opsets = [make.make_opsetid("", 18)]
    onnx.save(make.make_model(graph, opset_imports=opsets, ir_version=9), tmp_path / "m.onnx")
    if written[0] != "--replace":
        written = [word for name in written for word in ("--replace", name)]
    code, said = command("export", tmp_path / "m.onnx", "-o", tmp_path / "out", *written)
    assert code == 0, said
    names = ["fc.bias", "head.weight", "head.bias"]
    table = read_manifest(tmp_path / "out").slots
    assert sorted(slot.parameter for slot in table.replacements) == sorted(names)
    whole = {name: Replacement(torch.from_numpy(saved[name])) for name in names}
    add_adapters(tmp_path / "out", {"a": Adapter({}, replacements=whole)})
    x = numbers.standard_normal((4, 3)).astype(np.float32)
    runtime = Runtime(tmp_path / "out", threads=1)

    def wanted(bias, head):
        hidden = x.astype(np.float64) @ base["fc.weight"].T + bias["fc.bias"]
        return hidden @ head["head.weight"].T + head["head.bias"]

    np.testing.assert_allclose(runtime.run({"x": x})["y"], wanted(base, base), **CLOSE)
    np.testing.assert_allclose(runtime.run({"x": x}, "a")["y"], wanted(saved, saved), **CLOSE)
    assert np.abs(wanted(saved, saved) - wanted(base, saved)).max() > 0.1
    assert np.abs(wanted(saved, saved) - wanted(saved, base)).max() > 0.1
