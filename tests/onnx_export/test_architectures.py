"""Decoders of several architectures: every linear module has a slot, parity holds."""

import json

import pytest
import torch
import transformers
from peft_cases import Case
from safetensors.torch import load_file, save_file
from tiny_llm import PHI3, SIZES, save_adapter, save_base

from converters.formats.registry import read_adapter
from converters.onnx import ExportOptions, add_adapters, export_base, exporting
from converters.onnx.exporters.genai_builder import _BUILT, _HEADS, _ROTATED_PARTS, builds
from converters.onnx.modules.base_parameters import BaseParameters
from converters.onnx.slots.inserting import SlotOptions
from loraport.base.loading import load_model
from loraport.bundle.manifest import read_manifest
from loraport.errors import LoraportError
from loraport.parity import verify_bundle

ARCHITECTURES = {
    "Qwen2": SIZES,
    "Qwen3": SIZES,
    "Gemma": SIZES,
    "Phi3": PHI3,
    # Norms with another epsilon than the builder's, under a name that it does not know.
    "Phi": PHI3
    | {"num_hidden_layers": 1, "num_key_value_heads": 4, "layer_norm_eps": 1e-3}
    | {"partial_rotary_factor": 1.0},
}
# Gemma's norms multiply by one more than their weights, and the builder stores the sums. It is
# published in bfloat16, and its embeddings are multiplied by a root that is no short number.
SAVED = {"Gemma": ("model.norm", "model.layers.0.input_layernorm")}
PUBLISHED = {"Gemma": torch.bfloat16}
# The configuration says that the head is the embedding, and the files hold two that differ.
CALLED_TIED = ("Qwen3",)


def test_the_builder_is_given_no_decoder_that_it_does_not_know():
    """Control: one that it knows."""
    assert not builds("GPT2LMHeadModel", {})
    assert not builds("OlmoForCausalLM", {"clip_qkv": 8.0})  # it would leave the bounds out
    assert builds("OlmoForCausalLM", {"clip_qkv": None})
    assert builds("LlamaForCausalLM", {})
    assert builds("LlamaForCausalLM", {"rope_scaling": 2, "head_dim": "64"})  # transformers refuses
    assert not builds("FalconForCausalLM", {})
    floats, mxfp4 = {"hidden_size": 64}, {"quantization_config": {"quant_method": "mxfp4"}}
    assert builds("GptOssForCausalLM", floats)
    assert not builds("GptOssForCausalLM", floats, "int4")  # "tensor ... was not found"
    assert builds("GptOssForCausalLM", floats | mxfp4, "int4")
    assert not builds("Lfm2ForCausalLM", {})  # its convolutions' caches are fed by no runner


LONG = {"rope_type": "longrope"}
HEADS = {"num_attention_heads": 4}
HALF = {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}
WITH_EXPERTS = {"layer_types": ["attention"]}  # eight by its class
ATTENTION = WITH_EXPERTS | {"num_local_experts": 0}


@pytest.mark.parametrize(
    ("name", "left_out", "whole"),
    [
        ("Phi", {"qk_layernorm": True}, {"qk_layernorm": False}),
        ("Nemotron", {"mlp_bias": True}, {"attention_bias": True}),
        ("GraniteMoeHybrid", ATTENTION | {"num_local_experts": 4}, ATTENTION),
        ("GraniteMoeHybrid", WITH_EXPERTS, ATTENTION),
        ("GraniteMoeHybrid", ATTENTION | {"layer_types": ["mamba", "attention"]}, ATTENTION),
        ("Llama", {"rope_parameters": LONG}, {"rope_parameters": {"rope_type": "yarn"}}),
        ("Llama", {"rope_scaling": {"type": "longrope"}}, {"rope_scaling": None}),
        ("Phi3", {"clip_qkv": 1.0}, {"rope_parameters": LONG}),
        ("Llama", {"hidden_act": "quick_gelu"}, {"hidden_act": "silu"}),
        ("Llama", {"head_dim": 24}, {"head_dim": 48}),
        ("Llama", HEADS | {"hidden_size": 96}, HEADS | {"hidden_size": 64}),
        ("Qwen3", HEADS | {"head_dim": 24}, HEADS | {"hidden_size": 96}),  # 128 wide by its class
        ("Llama", HALF | {"head_dim": 48}, HALF | {"head_dim": 64}),
        ("Phi", {"head_dim": 16, "partial_rotary_factor": 0.5}, {"head_dim": 32}),
        ("Phi", {"head_dim": 16}, {"head_dim": 16, "partial_rotary_factor": 1.0}),
        ("Nemotron", {"head_dim": 16}, {"head_dim": 32}),
    ],
)
def test_the_builder_is_given_no_decoder_of_which_it_leaves_something_out(name, left_out, whole):
    assert not builds(f"{name}ForCausalLM", left_out)
    assert builds(f"{name}ForCausalLM", whole)


def test_what_decoders_have_unless_told_is_transformers_own():
    found, heads = {}, {}
    for architecture in sorted(_BUILT):
        kind = getattr(transformers, architecture.replace("ForCausalLM", "Config"), None)
        if kind is not None:  # some are known to the hub alone
            own = kind().get_text_config()
            settings = getattr(own, "rope_parameters", None) or {}
            found[architecture] = settings.get("partial_rotary_factor", 1.0)
            own = type(own)(hidden_size=1024, num_attention_heads=32, num_key_value_heads=32)
            heads[architecture] = getattr(own, "head_dim", None) or 1024 // 32
    assert {name: part for name, part in found.items() if part != 1.0} == _ROTATED_PARTS
    assert {name: size for name, size in heads.items() if size != 1024 // 32} == _HEADS
    assert len(found) > 15


@pytest.mark.parametrize("name", ["Bloom", "Llama"])
def test_a_decoder_that_the_builder_does_not_know_is_torchs(name, tmp_path, monkeypatch):
    """It was refused. What torch makes of decoders is tested with GPT-2. Control: a Llama."""
    config = getattr(transformers, f"{name}Config")(hidden_size=512, vocab_size=SIZES["vocab_size"])
    config.num_hidden_layers = 1
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    base, said = save_base(tmp_path / "base", model), []

    def stop(*_, **__):
        raise LoraportError("stopped")

    monkeypatch.setattr(exporting, "build_with_genai", stop)
    monkeypatch.setattr(exporting, "_export_encoder", stop)
    with pytest.raises(LoraportError, match="stopped"):
        export_base(base, tmp_path / "bundle", progress=said.append)
    assert ("takes whole texts, without a cache" in said[-1]) == (name == "Bloom")
    assert ("does not know BloomForCausalLM" in said[-1]) == (name == "Bloom")
    assert ("with ONNX Runtime GenAI" in said[-1]) == (name == "Llama")


@pytest.mark.parametrize(
    ("lost", "tied", "told"),
    [
        ("lm_head.weight", False, "got none for 1, lm_head.weight among them"),
        ("lm_head.weight", True, "built"),
        ("shape", False, "model.norm.weight: expected shape [32], as config.json says, got [5]"),
        ("head", True, "expected one shape of the tensors that config.json ties"),
        ("shard", False, "model-00002-of-00003.safetensors: expected the shard in"),
        ("torn", False, "torn.safetensors: expected a readable safetensors header"),
        ("tokenizer", False, "its tokenizer cannot be loaded"),
        ("index", False, "built"),  # names a tensor that no file holds, and no model needs
        ("nothing", False, "built"),
    ],
)
def test_what_a_decoder_lacks_is_told_before_it_is_built(lost, tied, told, tmp_path, monkeypatch):
    """A build takes minutes, and draws weights that are missing at random. Controls: two whole."""
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**SIZES, tie_word_embeddings=tied)
    )
    base = save_base(tmp_path / "base", model)
    file, index = base / "model.safetensors", base / "model.safetensors.index.json"
    tensors = load_file(file)
    tensors.pop(lost, None)
    if lost == "shape":
        tensors["model.norm.weight"] = torch.ones(5)
    if lost == "head":
        tensors["lm_head.weight"] = torch.ones(5, SIZES["hidden_size"])
    save_file(tensors, file, {"format": "pt"})
    if lost in ("shard", "torn", "index"):
        shard = "model-00002-of-00003.safetensors" if lost == "shard" else "torn.safetensors"
        if lost != "shard":
            (base / shard).write_bytes(file.read_bytes()[: -1 if lost == "torn" else None])
        file.unlink()
        names = [*tensors, "old.inv_freq"] if lost == "index" else [*tensors]
        index.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, shard)}))
    if lost == "tokenizer":
        (base / "tokenizer.json").unlink()

    def build(*_, **__):
        raise LoraportError("built")

    monkeypatch.setattr(exporting, "build_with_genai", build)
    with pytest.raises(LoraportError) as refused:
        export_base(base, tmp_path / "bundle")
    assert told in str(refused.value)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_slots_and_parity(name, tmp_path):
    config = getattr(transformers, f"{name}Config")(**ARCHITECTURES[name])
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    saved = SAVED.get(name, ())
    with torch.no_grad():
        for norm in saved:
            model.get_parameter(f"{norm}.weight").normal_(0, 0.2)
    model.config.tie_word_embeddings |= name in CALLED_TIED
    base = save_base(tmp_path / "base", model.to(PUBLISHED.get(name)))
    model.float()
    if name in CALLED_TIED:
        loaded = load_model(str(base))
        assert (loaded.lm_head.weight - loaded.model.embed_tokens.weight).abs().max() > 0.1
    options = ExportOptions(slots=SlotOptions(replace=saved))
    export_base(base, str(tmp_path / "bundle"), options)
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
    options = {"target_modules": targets, "r": 4, "lora_alpha": 6, "modules_to_save": [*saved]}
    case = Case(lambda: model, options)
    adapter = read_adapter(save_adapter(base, case, tmp_path / "adapter"))
    assert adapter.modules.keys() == manifest.slots.modules().keys()
    assert adapter.replacements.keys() == {f"{norm}.weight" for norm in saved}
    add_adapters(tmp_path / "bundle", {"a": adapter})
    report = verify_bundle(str(tmp_path / "bundle"), load_model(str(base)), {"a": adapter})
    assert report.passed, [check for check in report.checks if not check.passed]
    assert report.samples >= 20
