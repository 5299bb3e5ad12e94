"""Recorded passes of candidates that train together; see ``tests/training/test_cuda_graphs.py``."""

import contextlib

import pytest
import torch

from loraport.sweep.loss import grouped_language_model_loss, repeat
from loraport.sweep.observer import SilentSweep
from loraport.sweep.together import train_together
from loraport.sweep.trial import Trial
from loraport.training import LoopOptions, LoraOptions
from loraport.training.data.batches import Row
from loraport.training.data.end_to_end import lay_end_to_end
from loraport.training.data.packing import make_batches


class Replays:
    """Runs again what it was given, as a GPU repeats what was recorded."""

    def __init__(self, *, ahead=True):
        self.recorded, self.replayed, self.begun = 0, 0, 0
        self.ahead = ahead

    def __call__(self, run):
        self.recorded += 1
        state = {"dtype": torch.bfloat16, "enabled": torch.is_autocast_enabled("cpu")}

        def replay():
            self.replayed += 1
            with torch.enable_grad(), torch.autocast("cpu", **state):
                run()

        run()
        return replay

    def stream(self):
        return contextlib.nullcontext()

    def anew(self):
        self.begun += 1
        return self

    def runs_ahead(self, run):
        run()
        return self.ahead

    def has_room(self):
        return True


def rows(count):
    numbers = torch.Generator().manual_seed(0)
    drawn = [torch.randint(1, 12, (6 + 5 * (i % 4),), generator=numbers) for i in range(count)]
    return [Row(tuple(each.tolist()), tuple(each.tolist())) for each in drawn]


class Notes(SilentSweep):
    """Keeps what it is told."""

    def __init__(self):
        self.told = []

    def note(self, text):
        self.told.append(text)


def trained(model, trials, recorder, dtype, observer=None):
    batches = make_batches(
        model, rows(16), 4, 0, 0, packing="auto", max_length=64, few_lengths=True
    )
    held_out = make_batches(model, rows(8), 4, 0, None, packing="auto", max_length=64)
    loop = LoopOptions(
        steps=12, device="cpu", dtype=dtype, validate_every=4, early_stopping=1, accumulate=2
    )
    return train_together(
        model,
        trials,
        batches,
        grouped_language_model_loss,
        loop,
        validation=held_out,
        recorder=recorder,
        observer=observer,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_candidates_learn_the_same(make_llama, dtype):
    """Stacks of two ranks, DoRA beside them, and one that ends early: then others are recorded."""
    trials = [
        Trial("r2", LoraOptions(rank=2), 0.01),
        Trial("r4", LoraOptions(rank=4), 0.01),
        Trial("r4 fast", LoraOptions(rank=4), 0.02),
        Trial("r4 ends", LoraOptions(rank=4), 300.0),
        Trial("dora", LoraOptions(rank=4, use_dora=True), 0.01),
    ]
    replays = Replays()
    expected = trained(make_llama(), trials, None, dtype)
    got = trained(make_llama(), trials, replays, dtype)
    assert replays.begun == 2  # with all, and without the one that ended
    assert replays.recorded >= 4
    assert replays.replayed > replays.recorded
    assert len(expected["r4 ends"].losses) < 12 == len(expected["r4"].losses)
    for name, theirs in expected.items():
        assert got[name].losses == theirs.losses
        assert got[name].validations == theirs.validations
        for path, module in (theirs.modules or {}).items():
            assert torch.equal(got[name].modules[path].lora_B, module.lora_B)
    assert len(expected["r4"].modules) > 3
    assert expected["r4"].losses[-1] != expected["r4 fast"].losses[-1]


def test_one_alone_is_recorded_too(make_llama):
    trials = [Trial("r4", LoraOptions(rank=4), 0.01)]
    replays = Replays()
    expected = trained(make_llama(), trials, None, "bfloat16")["r4"].losses
    assert trained(make_llama(), trials, replays, "bfloat16")["r4"].losses == expected
    assert replays.replayed > replays.recorded > 0
    assert expected[-1][1] < expected[0][1]


def test_what_is_not_recorded_is_told(make_llama):
    trials = [Trial(f"r{rank}", LoraOptions(rank=rank), 0.01) for rank in (2, 4)]
    notes, replays = Notes(), Replays(ahead=False)
    got = trained(make_llama(), trials, replays, "float32", notes)
    (told,) = notes.told
    expected = "passes are not recorded (CUDA graphs): a pass of LlamaForCausalLM waits for the GPU"
    assert told == expected
    assert replays.recorded == 0
    assert got["r4"].losses == trained(make_llama(), trials, None, "float32")["r4"].losses
    notes = Notes()
    trained(make_llama(), trials, Replays(), "float32", notes)
    assert notes.told == []


def test_where_rows_begin_is_repeated():
    batch = lay_end_to_end([rows(3)], 0, share=False).to(torch.device("cpu"))
    size = batch.tokens.numel()
    bounds = repeat(batch, 3).bounds
    assert bounds.dtype is torch.int32
    per = batch.bounds.numel()
    for number in range(3):
        assert torch.equal(bounds[number * per : (number + 1) * per] - number * size, batch.bounds)
    assert bounds[0] == 0
    assert bounds[-1] == 3 * size
    assert bool((bounds.diff() >= 0).all())
