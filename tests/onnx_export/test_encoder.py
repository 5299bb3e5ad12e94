"""An encoder directory, exported through torch, computes with an adapter what PEFT computes."""

import numpy as np
import pytest
import torch
from peft_cases import Case, bert, load_with_peft, make_case
from tiny_llm import tokenizer
from torch import nn

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters, export_base
from loraport.bundle.manifest import read_manifest
from loraport.parity import verify_bundle
from loraport.runtime import Runtime


@pytest.fixture(scope="module")
def encoder_base(tmp_path_factory):
    out = tmp_path_factory.mktemp("bert") / "base"
    torch.manual_seed(0)
    model = bert().eval()
    model.resize_token_embeddings(320, mean_resizing=False)
    model.save_pretrained(out)
    tokenizer().save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def made(encoder_base, tmp_path_factory):
    from loraport.base_model import load_model

    options = {"target_modules": ["query", "value", "dense"], "r": 4, "use_rslora": True}
    out = tmp_path_factory.mktemp("bert") / "a"
    return make_case(Case(bert, options), out, base=load_model(str(encoder_base)))


@pytest.fixture(scope="module")
def encoder(encoder_base, made, tmp_path_factory):
    out = tmp_path_factory.mktemp("bert") / "bundle"
    export_base(str(encoder_base), out)
    add_adapters(out, {"a": read_adapter(made.path)})
    return out


def test_every_linear_module_has_a_slot(encoder, made):
    linear = [n for n, m in made.base.named_modules() if isinstance(m, nn.Linear)]
    assert sorted(read_manifest(encoder).slots.modules()) == sorted(linear)
    assert read_manifest(encoder).unslotted == {}


@pytest.mark.parametrize("texts", [["Ships."], ["One longer text, 東京.", "Two", "III"]])
def test_batch_and_length_are_free_and_the_numbers_are_pefts(encoder, made, texts):
    encoded = tokenizer()(texts, padding=True, return_tensors="np")
    runtime = Runtime(encoder)
    accepted = [entry.name for entry in runtime.session.get_inputs()]
    arrays = {name: np.asarray(encoded[name], np.int64) for name in accepted}
    peft_model = load_with_peft(made.fresh_base(), made.path)
    with torch.no_grad():
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        base, adapted = (model(**tensors).logits for model in (made.base, peft_model))
    np.testing.assert_allclose(runtime.run(arrays)["logits"], base, atol=1e-4)
    np.testing.assert_allclose(runtime.run(arrays, "a")["logits"], adapted, atol=1e-4)
    assert (adapted - base).abs().max() > 0.05


def test_the_protocol_holds(encoder, made):
    report = verify_bundle(encoder, made.fresh_base(), {"a": read_adapter(made.path)})
    assert report.passed, [check for check in report.checks if not check.passed]
    assert report.samples >= 20
