"""What transformers' reader of GGUF files leaves out: rotations, head sizes, scales."""

import numpy as np
import pytest
import torch
from llama_gguf import tiny_decoder, write_gguf_base

from loraport.base.gguf.settings import unread_settings
from loraport.base.loading import load_model
from loraport.errors import LoraportError

_THETA = 10000.0
_CONTEXT = 128  # tiny_decoder's
# transformers' settings, and the fields that llama.cpp's converter writes of them.
_ROTATIONS = {
    "linear": (
        {"rope_type": "linear", "factor": 4.0},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    ),
    "linear_unnamed": (
        {"rope_type": "linear", "factor": 4.0},
        {"rope.scaling.factor": 4.0},
    ),
    "yarn": (
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 32,
        },
    ),
    "none": ({"rope_type": "default"}, {"rope.scaling.type": "none"}),
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LORAPORT_CACHE", str(tmp_path / "cache"))


def outputs(model):
    tokens = torch.arange(1, 60).reshape(1, -1)
    with torch.no_grad():
        return model(input_ids=tokens).logits


def rotated(settings):
    return tiny_decoder("llama", rope_parameters={"rope_theta": _THETA, **settings})


def divisors(settings):
    """What Llama 3.1 divides each frequency by, as transformers computes it."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=64,
        num_attention_heads=4,
        max_position_embeddings=_CONTEXT,
        rope_parameters={"rope_theta": _THETA, **settings},
    )
    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config)
    plain = _THETA ** -(torch.arange(8, dtype=torch.float64) / 8)
    return (plain / stretched.double()).to(torch.float32).numpy()


@pytest.mark.parametrize("name", sorted(_ROTATIONS))
def test_a_base_is_rotated_as_its_file_says(name, tmp_path):
    settings, fields = _ROTATIONS[name]
    source = rotated(settings)
    loaded = load_model(str(write_gguf_base(source, tmp_path / "base.gguf", fields=fields)))
    assert torch.allclose(outputs(loaded), outputs(source), rtol=0, atol=1e-6)
    plain = load_model(str(write_gguf_base(source, tmp_path / "plain.gguf")))
    differs = (outputs(plain) - outputs(source)).abs().max() > 0.01
    assert differs == (name != "none")


def test_llama_3_s_rotation_is_known_by_its_table(tmp_path):
    """llama.cpp's converter writes no other word of it."""
    source = rotated(_LLAMA3)
    tables = {"rope_freqs.weight": divisors(_LLAMA3)}
    assert len(np.unique(tables["rope_freqs.weight"].round(3))) == 3
    loaded = load_model(str(write_gguf_base(source, tmp_path / "base.gguf", tables=tables)))
    found = loaded.config.rope_parameters
    assert {key: found[key] for key in _LLAMA3} == _LLAMA3
    assert torch.allclose(outputs(loaded), outputs(source), rtol=0, atol=1e-6)
    ones = {"rope_freqs.weight": np.ones(8, dtype=np.float32)}
    plain = load_model(str(write_gguf_base(source, tmp_path / "plain.gguf", tables=ones)))
    assert plain.config.rope_parameters["rope_type"] == "default"
    assert (outputs(plain) - outputs(source)).abs().max() > 0.01


@pytest.mark.parametrize(
    ("fields", "table", "message"),
    [
        ({}, [1, 1.5, 2, 4, 5, 6, 8, 8], r"rope_freqs\.weight: expected what Llama 3\.1 .*1\.5, 2"),
        ({"rope.scaling.type": "longrope"}, [1] * 8, "none, linear, yarn .* got longrope"),
        ({"rope.scaling.factor": 2.0}, None, r"got linear with factor 2 beside rope_freqs\.weight"),
    ],
)
def test_other_rotations_are_refused(fields, table, message, tmp_path):
    values = divisors(_LLAMA3) if table is None else np.array(table, dtype=np.float32)
    tables = {"rope_freqs.weight": values}
    model = tiny_decoder("llama")
    file = write_gguf_base(model, tmp_path / "base.gguf", fields=fields, tables=tables)
    with pytest.raises(LoraportError, match=rf"base .*base\.gguf: .*{message}"):
        load_model(str(file))


_SIZES = {"context_length": 4096, "embedding_length": 64, "attention.head_count": 4}
_LONG = {"rope_factors_long.weight": [1.0, 9.0], "rope_factors_short.weight": [1.0, 1.5]}


@pytest.mark.parametrize(
    ("architecture", "fields", "tables", "expected"),
    [
        ("starcoder2", {"rope.freq_base": 999999.0}, {}, {"rope_theta": 999999.0}),
        (
            "stablelm",
            {"rope.freq_base": 5e4, "rope.dimension_count": 4},
            {},
            {"rope_theta": 5e4, "partial_rotary_factor": 0.25},
        ),
        (
            "phi3",
            {
                "rope.dimension_count": 12,
                "rope.scaling.original_context_length": 2048,
                "rope.scaling.attn_factor": 1.25,
            },
            _LONG,
            {
                "partial_rotary_factor": 0.75,
                "original_max_position_embeddings": 2048,
                "rope_scaling": {
                    "rope_type": "longrope",
                    "long_factor": [1.0, 9.0],
                    "short_factor": [1.0, 1.5],
                    "attention_factor": 1.25,
                },
            },
        ),
        ("qwen3", {"attention.key_length": 32}, {}, {"head_dim": 32}),
        (
            "qwen2moe",
            {"expert_feed_forward_length": 24, "expert_shared_feed_forward_length": 40},
            {},
            {"moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
        ),
        (
            "gemma3",
            {
                "block_count": 34,
                "attention.key_length": 256,
                "rope.scaling.type": "linear",
                "rope.scaling.factor": 8.0,
            },
            {},
            {
                "query_pre_attn_scalar": 256,
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
            },
        ),
        # Both of 27B divide by what is not their heads' size.
        (
            "gemma3",
            {"block_count": 62, "embedding_length": 5376, "attention.head_count": 32},
            {},
            {"query_pre_attn_scalar": 168},
        ),
        (
            "gemma2",
            {"block_count": 46, "embedding_length": 4608, "attention.head_count": 32},
            {},
            {"query_pre_attn_scalar": 144},
        ),
        ("qwen2", {"rope.freq_base": 1e6, "attention.key_length": 16}, {}, {}),
    ],
)
def test_settings_by_architecture(architecture, fields, tables, expected):
    own = {f"{architecture}.{key}": value for key, value in {**_SIZES, **fields}.items()}
    assert unread_settings(architecture, own, tables) == expected


def test_a_llama_called_mistral_is_read_as_what_it_is(tmp_path):
    """transformers makes a Mistral of it by that name, whose tensors gguf does not know."""
    made = tiny_decoder("llama")
    file = write_gguf_base(made, tmp_path / "base.gguf", name="mistral")
    model = load_model(str(file))
    assert model.config.model_type == "llama"
    assert torch.allclose(outputs(model), outputs(made), rtol=0, atol=1e-5)
