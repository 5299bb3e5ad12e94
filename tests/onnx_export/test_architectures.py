"""Decoders of several architectures: every linear module has a slot, parity holds."""

import pytest
import torch
import transformers
from peft_cases import Case
from tiny_llm import GEMMA, PHI3, SIZES, save_adapter, save_base

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters, export_base
from converters.onnx.exporters.genai_builder import builds
from converters.onnx.modules.base_parameters import BaseParameters
from loraport.base_model import load_model
from loraport.bundle.manifest import read_manifest
from loraport.parity import verify_bundle

ARCHITECTURES = {
    "Qwen2": SIZES,
    "Qwen3": SIZES,
    "Gemma": GEMMA,
    "Phi3": PHI3,
}


def test_the_builder_is_given_no_decoder_that_it_does_not_know():
    """Control: one that it knows."""
    assert not builds("GPT2LMHeadModel")
    assert builds("LlamaForCausalLM")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_slots_and_parity(name, tmp_path):
    config = getattr(transformers, f"{name}Config")(**ARCHITECTURES[name])
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    base = save_base(tmp_path / "base", model)
    export_base(str(base), tmp_path / "bundle")
    manifest = read_manifest(tmp_path / "bundle")
    linear = {path for path, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    unslotted = dict(manifest.unslotted)
    assert "--lm-head" in unslotted.pop("lm_head")
    assert unslotted == {}
    assert manifest.slots.modules().keys() | manifest.unslotted.keys() == linear
    parameters = BaseParameters(tmp_path / "bundle", manifest)
    for path in manifest.slots.modules():  # Phi-3's gate_up_proj is two operators' of the builder
        assert torch.equal(parameters.weight(path), model.get_submodule(path).weight)
    targets = sorted({path.rpartition(".")[2] for path in manifest.slots.modules()})
    case = Case(lambda: model, {"target_modules": targets, "r": 4, "lora_alpha": 6})
    adapter = read_adapter(save_adapter(base, case, tmp_path / "adapter"))
    assert adapter.modules.keys() == manifest.slots.modules().keys()
    add_adapters(tmp_path / "bundle", {"a": adapter})
    report = verify_bundle(tmp_path / "bundle", load_model(str(base)), {"a": adapter})
    assert report.passed, [check for check in report.checks if not check.passed]
    assert report.samples >= 20
