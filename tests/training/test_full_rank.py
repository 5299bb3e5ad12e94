"""Ranks above a layer's smaller dimension: they train as in PEFT, and are told once."""

import json

import peft
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraport.cli.sweep import sweep
from loraport.cli.train import train
from loraport.peft_layout import read_peft
from loraport.sweep.observer import SilentSweep
from loraport.sweep.spread import Hired
from loraport.training.lora.full_rank import above_full_rank, full_rank
from loraport.training.lora.layers import lora_layer_for
from loraport.training.options import LoraOptions

TOLD = (
    "the rank is above the smaller dimension of k_proj, v_proj (rank 20, smaller dimension 16): "
    "with a rank of that dimension such a layer can learn as much, and the adapter is smaller"
)


@pytest.mark.parametrize(
    ("module", "most"),
    [
        (nn.Linear(7, 5), 5),
        (nn.Linear(4, 9), 4),
        (Conv1D(5, 8), 5),
        (nn.Embedding(11, 3), 3),
        (nn.Conv2d(2, 30, 3), 18),
        (nn.Conv1d(6, 4, 3), 4),
    ],
)
def test_a_change_of_a_weight_has_no_higher_rank(module, most):
    """Against PEFT's own change, with a rank of which there is enough."""
    assert full_rank(lora_layer_for(module), module) == most
    for rank in (most - 1, most, most + 4):
        config = peft.LoraConfig(
            r=rank,
            target_modules=["m"],
            init_lora_weights=False,
            fan_in_fan_out=isinstance(module, Conv1D),
        )
        layer = peft.get_peft_model(nn.ModuleDict({"m": module}), config).base_model.model["m"]
        change = layer.get_delta_weight("default").double().flatten(1)
        assert torch.linalg.matrix_rank(change, rtol=1e-5) == min(rank, most)


def test_the_layers_are_told_by_name_each_with_its_rank(llama):
    plain = LoraOptions(rank=20)
    assert above_full_rank(llama, [plain]) == TOLD
    assert above_full_rank(llama, [LoraOptions(rank=16)]) is None
    assert above_full_rank(llama, [LoraOptions(rank=4), plain, LoraOptions(rank=18)]) == TOLD
    assert above_full_rank(llama, [LoraOptions(rank=20, targets=("q_proj",))]) is None
    lower = LoraOptions(rank=20, rank_pattern={"[kv]_proj": 16, "o_proj": 33}, layers="1")
    assert "dimension of o_proj (rank 33, smaller dimension 32): " in above_full_rank(
        llama, [lower]
    )


def test_every_command_that_trains_tells_it_once(base_directory, chat_data, tmp_path):
    def told(command, *more):
        arguments = [base_directory, chat_data, "--device", "cpu", *more]
        found = CliRunner().invoke(command, [str(each) for each in arguments])
        assert found.exit_code == 0, found.output
        return found.stderr.count(f"note: {TOLD}\n"), found.stdout

    steps = ("--steps", 1, "--max-length", 64)
    assert told(train, *steps, "-o", tmp_path / "a", "--rank", 20)[0] == 1
    ranks = {len(module.lora_A) for module in read_peft(tmp_path / "a").modules.values()}
    assert ranks == {20}
    ways = ("--rank", "2,20", "--lr", "1e-3", "--together", 1)
    assert told(sweep, *steps, *ways, "-o", tmp_path / "c")[0] == 1
    dry = ("--dry-run", "--json", "--batch-size", 1, "--max-length", 8)
    for rank, note in ((20, TOLD), (16, None)):
        times, printed = told(train, *dry, "--rank", rank)
        assert (times, json.loads(printed)["note"]) == (int(rank == 20), note)


def test_what_all_workers_of_a_cluster_note_is_said_once():
    said = []

    class Listener(SilentSweep):
        def note(self, text):
            said.append(text)

        def stepped(self, **told):
            said.append(told["step"])

    hired = Hired(None, 2, (), Listener(), "base")
    step = ("stepped", {"step": 1, "losses": {}, "tokens": 1})
    for _ in range(2):
        hired._tell([("note", {"text": TOLD}), step, ("note", {"text": "another"})])
    assert said == [TOLD, 1, "another", 1]
