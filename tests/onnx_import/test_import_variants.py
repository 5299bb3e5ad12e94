"""Variants in models that other tools exported: TorchScript's graphs and 8-bit ones."""

import logging
import warnings

import numpy as np
import pytest
import torch
from peft_cases import Case, ConvNet, bert, make_case

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters
from converters.onnx.importing import ImportOptions, import_model
from converters.onnx.slots.inserting import SlotOptions
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
