"""What is computed from some of a model's layers is what tracing each of them gives."""

from dataclasses import replace

import pytest
import torch
import transformers

from loraport.training import LoopOptions, LoraOptions, TrainOptions
from loraport.training.devices import choose_placement
from loraport.training.memory import step_memory as traced
from loraport.training.memory.repeated_layers import find_units

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": 61}
PLAIN = TrainOptions(
    lora=LoraOptions(rank=2, targets=("o_proj",)),
    loop=LoopOptions(device="cpu", dtype="float32"),
    batch_size=2,
    max_length=12,
)
# Of rounded matrices, which take more than activations.
MATRICES = replace(
    PLAIN,
    lora=LoraOptions(rank=16, targets=("q_proj", "down_proj")),
    loop=replace(PLAIN.loop, dtype="bfloat16", accumulate=2),
    gradient_checkpointing=True,
    max_length=2,
)


def decoder(name, **more):
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **more})
    with torch.device("meta"):
        return getattr(transformers, f"{name}ForCausalLM")(config)


def llama(layers=5, **more):
    return decoder("Llama", num_hidden_layers=layers, num_key_value_heads=1, **more)


def experts(layers=6):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    heads = {"head_dim": 8, "num_key_value_heads": 1}
    return decoder("Qwen3Moe", num_hidden_layers=layers, mlp_only_layers=[0], **sizes, **heads)


@pytest.mark.parametrize(
    ("model", "options", "kept"),
    [
        (llama(tie_word_embeddings=True), MATRICES, 4),
        (experts(), PLAIN, 5),  # the first has none
    ],
)
def test_some_layers_tell_what_all_take(monkeypatch, model, options, kept):
    placement = choose_placement("cpu", options.loop.dtype)
    lengths = []
    one = traced._traced

    def watched(model, options, placement, units):
        found = one(model, options, placement, units)
        lengths.append(len(model.model.layers))
        return found

    monkeypatch.setattr(traced, "_traced", watched)
    some = traced.step_memory(model, options, placement)
    monkeypatch.setattr(traced, "find_units", lambda _: None)
    every = traced.step_memory(model, options, placement)
    assert some == every
    assert lengths == [kept, len(model.model.layers)]


def test_layers_repeat_every_few():
    windows = {"head_dim": 8, "num_key_value_heads": 1, "sliding_window": 4}
    units = find_units(decoder("Gemma2", num_hidden_layers=13, **windows))
    assert (units.first, units.period, units.kept, units.omitted) == (0, 2, 9, 2)
    first = replace(PLAIN, gradient_checkpointing=True, checkpointed_layers=2)
    units = find_units(traced._prepared(llama(7), first, torch.float32))
    assert (units.first, units.period, units.kept, units.omitted) == (2, 1, 6, 1)


def test_what_is_unlike_is_not_left_out():
    assert find_units(llama(5)).kept == 4
    assert find_units(llama(4)) is None
    last = llama()
    last.model.layers[-1].mlp.up_proj = torch.nn.Linear(16, 25, device="meta")
    assert find_units(last) is None
    shared = llama()
    shared.model.layers[4].mlp = shared.model.layers[2].mlp
    assert find_units(shared) is None
    told = llama()
    told.config.layer_types = ["full_attention"] * 4 + ["sliding_attention"]
    assert find_units(told) is None


def test_what_turns_out_unlike_is_traced_layer_by_layer(monkeypatch):
    """A layer that no setting sets apart: the model's code does something else in it."""
    model, placement = llama(), choose_placement("cpu", "float32")
    plain = traced.step_memory(model, PLAIN, placement)
    attention = type(model.model.layers[0].self_attn)
    own = attention.forward

    def forward(self, *given, **named):
        result, weights = own(self, *given, **named)
        return (result.sin().cos() if self.layer_idx == 2 else result), weights

    monkeypatch.setattr(attention, "forward", forward)
    some = traced.step_memory(model, PLAIN, placement)
    monkeypatch.setattr(traced, "find_units", lambda _: None)
    assert some == traced.step_memory(model, PLAIN, placement)
    assert some.activations > plain.activations
