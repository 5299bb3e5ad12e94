"""Decoders whose rotations are scaled for longer texts rotate in the graph as in the model."""

import copy

import numpy as np
import pytest
import torch
import transformers
from tiny_llm import LONG_PHI3, PHI3, SIZES, save_base

from converters.onnx import export_base
from converters.onnx.exporters.flat_rotations import flatten
from converters.onnx.exporters.scaled_rotations import own_frequencies, tables
from loraport.runtime import Runtime
from loraport.runtime.decoder import first_step_inputs, read_decoder

THETA = {"rope_theta": 1e4}
PLAIN = THETA | {"rope_type": "default"}
YARN = THETA | {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
KINDS = {
    "linear": THETA | {"rope_type": "linear", "factor": 4.0},
    "yarn": YARN,
    "yarn with all settings": YARN | {"beta_fast": 16.0, "beta_slow": 2.0, "attention_factor": 1.5},
    "yarn to the last bit": YARN | {"truncate": False},
    "llama3": THETA
    | {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    | {"original_max_position_embeddings": 64},
    "dynamic": THETA | {"rope_type": "dynamic", "factor": 4.0},
}
LENGTH = SIZES["max_position_embeddings"]


def config(settings):
    return transformers.LlamaConfig(**SIZES, rope_parameters=dict(settings))


def model_tables(settings):
    """What transformers' own module rotates by: cosines and sines of all positions."""
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config(settings))
    return [table[0].numpy() for table in rotary(torch.zeros(1), torch.arange(LENGTH)[None])]


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_the_models_own(kind):
    """Control: those that are not scaled, which dynamic ones are not within the context."""
    found = tables(*own_frequencies(config(KINDS[kind])), LENGTH)
    for got, wanted, plain in zip(
        found, model_tables(KINDS[kind]), model_tables(PLAIN), strict=True
    ):
        np.testing.assert_allclose(got.numpy(), wanted, rtol=0, atol=1e-6)
        assert (np.abs(wanted - plain).max() > 0.1) == (kind != "dynamic")


def test_others_are_the_builders():
    assert own_frequencies(config(PLAIN)) is None
    kinds = {"full_attention": KINDS["linear"], "sliding_attention": PLAIN}
    assert own_frequencies(flatten(transformers.Gemma3TextConfig(rope_parameters=kinds))) is None


def test_two_sets_of_factors_are_one_where_no_text_is_long_enough():
    """Control: where some are."""
    own = copy.deepcopy(LONG_PHI3)
    for border in (LENGTH, LENGTH + 1, LENGTH - 1):
        own |= {"max_position_embeddings": LENGTH, "original_max_position_embeddings": border}
        settings = transformers.Phi3Config(**copy.deepcopy(own))
        found = own_frequencies(settings)
        assert (found is None) == (border < LENGTH)
        if found is not None:
            rotary = transformers.models.phi3.modeling_phi3.Phi3RotaryEmbedding(settings)
            wanted = rotary(torch.zeros(1), torch.arange(LENGTH)[None])
            for got, table in zip(tables(*found, LENGTH), wanted, strict=True):
                np.testing.assert_allclose(got.numpy(), table[0].numpy(), rtol=0, atol=1e-6)


# SmolLM3 rotates some layers, a Granite 4 without position_embedding_type none, GPT-OSS's tables
# are made apart, and a Phi-3's context is not its original one. The first's MLP is as wide as the
# vocabulary is large: no head.
MODELS = {
    "SmolLM3": {"no_rope_layers": [1, 0], "rope_parameters": YARN}
    | {"intermediate_size": SIZES["vocab_size"]},
    "GraniteMoeHybrid": {"layer_types": ["attention"] * 2, "shared_intermediate_size": 48}
    | {"num_local_experts": 0, "num_experts_per_tok": 0, "attention_multiplier": 0.25},
    "GptOss": {"num_local_experts": 2, "num_experts_per_tok": 1, "rope_parameters": YARN},
    "Phi3": {"original_max_position_embeddings": 64},
}
OTHERS = {
    "SmolLM3": ({"no_rope_layers": [1, 1]}, {"rope_parameters": PLAIN}),
    "GraniteMoeHybrid": ({"position_embedding_type": "rope"},),
    "GptOss": ({"rope_parameters": PLAIN},),
    "Phi3": ({"rope_parameters": THETA | {"rope_theta": 500.0}},),
}


def made(name, **changed):
    sizes = {"GraniteMoeHybrid": SIZES | {"hidden_size": 64}, "Phi3": PHI3}.get(name, SIZES)
    settings = getattr(transformers, f"{name}Config")(**sizes | MODELS[name] | changed)
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(settings).eval()


@pytest.mark.parametrize("name", MODELS)
def test_layers_rotate_as_the_model_does(name, tmp_path):
    """Control: the same weights with other rotations give other logits."""
    model = made(name)
    base = save_base(tmp_path / "base", model)
    export_base(str(base), tmp_path / "bundle")
    ids = np.random.default_rng(0).integers(3, 250, 100).tolist()  # beyond the original context

    def logits(each):
        with torch.no_grad():
            return each(torch.tensor([ids]), use_cache=False).logits[0].numpy()

    runtime = Runtime(tmp_path / "bundle")
    inputs = first_step_inputs(runtime, read_decoder(tmp_path / "bundle"), ids)
    expected = logits(model)
    np.testing.assert_allclose(runtime.run(inputs)["logits"][0], expected, rtol=0, atol=2e-4)
    for changed in OTHERS[name]:
        other = made(name, **changed)
        other.load_state_dict(model.state_dict())
        assert np.abs(logits(other) - expected).max() > 1e-2
