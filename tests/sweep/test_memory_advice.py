"""What a sweep that runs out of memory says to change."""

import re

import torch
from click.testing import CliRunner

from loraport.cli.sweep import sweep
from loraport.errors import LoraportError
from loraport.sweep import worker
from loraport.training.run.faults import MemoryRanOutError


def refused(*arguments):
    """Return what a sweep that ends with an error says."""
    result = CliRunner().invoke(sweep, [str(each) for each in arguments])
    assert isinstance(result.exception, LoraportError), result.output
    return str(result.exception)


def test_out_of_memory_says_what_to_change(tiny_base, data, tmp_path, monkeypatch):
    """Of two candidates in one pass, too; what is named are options of this very command.

    Rows are half as long as they may be.
    """

    def full(*_, **__):
        calls.append(1)
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has")

    calls = []
    monkeypatch.setattr("loraport.training.losses.language_model.hidden_before", full)
    few = ("--rank", "2,4", "--lr", "1e-3", "--together", 2, "--device", "cpu", "--batch-size", 6)
    text = refused(tiny_base, data, "-o", tmp_path / "out", *few, "--max-length", 32)
    assert len(calls) == 2  # together, and one alone
    assert text.startswith("r2-a4-lr0.001: out of memory (Tried to allocate 2.00 GiB); ")
    saver = "--batch-size 3 --accumulate 2 (as many rows a step), --gradient-checkpointing"
    offered = f"{saver}, --max-length 8, lower ranks, or a smaller base"
    assert text.endswith(f"; to need less, try {offered}")
    known = {name for option in sweep.params for name in option.opts}
    assert set(re.findall(r"--[a-z-]+", offered)) <= known


def test_out_of_memory_behind_kept_steps_says_what_goes_on_from_them(
    tiny_base, data, tmp_path, monkeypatch
):
    real, calls = worker.Worker.train, []

    def full_at_second(self, *more):
        calls.append(1)
        if len(calls) > 1:
            raise MemoryRanOutError("out of memory")
        return real(self, *more)

    monkeypatch.setattr(worker.Worker, "train", full_at_second)
    few = ("--rank", "2,4", "--lr", "1e-3", "--apart", "--device", "cpu", "--steps", 1)
    told = []
    for out in ("behind", "without"):
        calls[:] = [1] * len(told)  # the second time nothing has been kept
        told.append(refused(tiny_base, data, "-o", tmp_path / out, *few))
    going_on = "; --resume goes on with --gradient-checkpointing"
    assert told[1].startswith("out of memory; to need less, try ")
    assert not told[1].endswith(going_on)
    assert told[0] == f"{told[1]}{going_on}"
