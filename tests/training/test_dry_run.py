"""Predicted memory: activations as autograd keeps them; the command."""

import itertools
import json

import pytest
import torch
from click.testing import CliRunner
from torch.autograd.graph import saved_tensors_hooks

from loraport.cli.train import train
from loraport.training import attach
from loraport.training.activations import activations
from loraport.training.dry_run import dry_run
from loraport.training.frozen_base import checkpoint_activations
from loraport.training.options import LoopOptions, LoraOptions, TrainOptions

SHAPE = 3, 40


def tiny(device):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    with torch.device(device):
        return LlamaForCausalLM(config)


def really_kept(checkpointing):
    """Bytes that autograd keeps of a real pass, parameters left out."""
    model = tiny("cpu")
    attach(model, LoraOptions(rank=4))
    model.train()
    if checkpointing:
        checkpoint_activations(model)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept, alive = {}, []

    def keep(tensor):
        alive.append(tensor)
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens, mask = torch.zeros(SHAPE, dtype=torch.int64), torch.ones(SHAPE, dtype=torch.int64)
    mask[0, -5:] = 0  # rows of unlike length
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model.model(input_ids=tokens, attention_mask=mask, use_cache=False)
    del result
    return sum(kept.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_what_autograd_keeps(checkpointing):
    model = tiny("meta")
    options = LoraOptions(rank=4)
    number = None if checkpointing else 0
    found = activations(model, options, torch.float32, SHAPE, checkpointed=number)
    real = really_kept(checkpointing)
    assert found.kept == pytest.approx(real, rel=0.02)
    # The control: with checkpointing it is far less, without it far more.
    other = really_kept(not checkpointing)
    assert found.kept < 0.3 * other if checkpointing else found.kept > 3 * other
    # The model is as it was, and gives the same again.
    again = activations(model, options, torch.float32, SHAPE, checkpointed=number)
    assert again == found
    assert all(parameter.is_meta for parameter in model.parameters())


def test_each_layer_that_is_computed_again_saves_the_same():
    model, options = tiny("meta"), LoraOptions(rank=4)
    kept = [
        activations(model, options, torch.float32, SHAPE, checkpointed=n).kept for n in range(5)
    ]
    saved = [before - after for before, after in itertools.pairwise(kept)]
    assert all(count == pytest.approx(saved[1], rel=0.1) for count in saved)
    assert saved[1] > 0.15 * kept[0]
    everything = activations(model, options, torch.float32, SHAPE, checkpointed=None)
    assert everything.kept == kept[4]


def test_more_tokens_take_more_and_bfloat16_takes_less():
    model, options = tiny("meta"), LoraOptions(rank=4)

    def kept(dtype, shape):
        return activations(model, options, dtype, shape, checkpointed=0).kept

    once = kept(torch.float32, SHAPE)
    assert kept(torch.float32, (6, 40)) == pytest.approx(2 * once, rel=0.02)
    assert kept(torch.bfloat16, SHAPE) < 0.85 * once


def test_what_does_not_fit_comes_with_what_would(base_directory, monkeypatch):
    options = TrainOptions(
        lora=LoraOptions(rank=4), loop=LoopOptions(device="cpu"), batch_size=8, max_length=64
    )
    whole = dry_run(str(base_directory), options)
    assert whole.fits
    assert not whole.alternatives
    monkeypatch.setattr(
        "loraport.training.dry_run.available_memory", lambda _: whole.prediction.total - 1
    )
    tight = dry_run(str(base_directory), options)
    assert not tight.fits
    assert tight.prediction == whole.prediction
    names = list(tight.alternatives)
    assert names[0] == "--gradient-checkpointing"
    assert names[1] == "--gradient-checkpointing --batch-size 1 --accumulate 8"
    assert tight.alternatives[names[1]].total < tight.prediction.total
    assert tight.alternatives[names[-1]].kept.base < tight.prediction.kept.base


def test_the_command_prints_a_table_and_writes_nothing(base_directory, chat_data, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    arguments = ["train", str(base_directory), str(chat_data), "--dry-run", "--device", "cpu"]
    shown = CliRunner().invoke(train, arguments[1:])
    assert shown.exit_code == 0, shown.output
    for words in ("activations of a full batch", "it fits"):
        assert words in shown.output
    as_json = CliRunner().invoke(train, [*arguments[1:], "--json"])
    document = json.loads(as_json.stdout)
    assert document["fits"] is True
    kept = document["prediction"]["kept"]
    assert kept["optimizer"] == 2 * kept["gradients"] > 0
    assert document["total"] == sum(kept.values()) + sum(
        document["prediction"][name] for name in ("activations", "temporary")
    )
    assert sorted(tmp_path.rglob("*")) == before


def test_without_an_output_only_a_dry_run_works(base_directory, chat_data):
    found = CliRunner().invoke(train, [str(base_directory), str(chat_data)])
    assert found.exit_code == 2
    assert "--out" in found.output
