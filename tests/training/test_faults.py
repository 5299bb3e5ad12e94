"""What ends a run: signals, memory, disk, other processes, patience."""

import errno
import os
import random
import signal
import time
from dataclasses import replace

import pytest
import torch
from torch import nn
from warm_programs import WarmProgram, run_program

from loraport.errors import LoraportError
from loraport.process_lock import only_process
from loraport.training import (
    LoopOptions,
    LoraOptions,
    TrainOptions,
    attach,
    lora_layers,
    train,
    train_language_model,
)
from loraport.training.run.interruption import Stopped, stop_requests
from loraport.training.run.observer import Silent
from loraport.training.run.optimizer import make_optimizer
from loraport.training.text import work_directory

pytestmark = pytest.mark.usefixtures("interruptible")
OPTIONS = TrainOptions(
    lora=LoraOptions(rank=4), loop=LoopOptions(learning_rate=0.02, steps=8, save_every=3)
)


def command(base, data, out, *more):
    options = ["--rank", "4", "--lr", "0.02", "--steps", "14", "--save-every", "3", *more]
    options += ["--validate-every", "2", "--early-stopping", "6", "--quiet"]
    return ["train", base, data, "-o", out, *options]


def test_a_signal_that_the_process_was_started_to_ignore_stays_ignored():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with stop_requests() as request:
        signal.raise_signal(signal.SIGINT)
        assert request.signal_number is None
        signal.raise_signal(signal.SIGTERM)
        assert request.signal_number == signal.SIGTERM
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_ctrl_c_a_request_to_end_and_a_closed_terminal_end_after_the_step(name):
    number = getattr(signal, name)
    before = signal.signal(number, signal.default_int_handler)
    try:
        with stop_requests() as request:
            signal.raise_signal(number)
            assert request.signal_number == number
            with pytest.raises(Stopped, match=f"stopped by {name}"):
                signal.raise_signal(number)
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, before)


def test_signals_end_with_a_checkpoint_and_a_kill_anywhere_resumes(
    base_directory, chat_data, tmp_path
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    done = run_program(command(base_directory, chat_data, whole), tmp_path)
    assert done.poll() == 0, done.stderr
    chance = random.Random()
    metrics = work_directory(parts) / "metrics.jsonl"
    ends = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGKILL: -9}
    for number, code in ends.items():
        there = metrics.read_text().count("\n") if metrics.exists() else 0
        lines = there + chance.randint(1, 4)
        run = WarmProgram(command(base_directory, chat_data, parts, "--resume"), tmp_path)
        while run.poll() is None:
            if metrics.exists() and metrics.read_text().count("\n") >= lines:
                break
            time.sleep(0.002)
        run.send_signal(number)
        assert run.wait() == code, run.stderr
        told = run.stderr
        assert "Traceback" not in told
        if number is not signal.SIGKILL:
            assert f"stopped by {number.name} after step" in told
            assert "continue with the same command and --resume" in told
        assert not parts.exists()
    done = run_program(command(base_directory, chat_data, parts, "--resume"), tmp_path)
    assert done.poll() == 0, done.stderr
    for name in ("metrics.jsonl", "adapter_model.safetensors", "adapter_config.json"):
        assert (parts / name).read_bytes() == (whole / name).read_bytes(), name


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ..."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    ],
)
def test_out_of_memory_says_what_to_change(base_directory, chat_data, tmp_path, monkeypatch, error):
    def full(*_):
        raise error

    monkeypatch.setattr("loraport.training.text.language_model_loss", full)
    with pytest.raises(LoraportError) as raised:
        train_language_model(str(base_directory), chat_data, tmp_path / "out", OPTIONS)
    text = str(raised.value)
    assert "out of memory" in text
    saver = "--batch-size 2 --accumulate 2 (as many rows a step), --gradient-checkpointing"
    assert f"{saver}, --base-dtype nf4, --max-length" in text
    assert "\n" not in text


@pytest.mark.parametrize(("where", "doing"), [("load_base", "loading"), ("_write", "writing")])
def test_memory_or_disk_that_runs_out_around_a_run_says_what_is_kept(
    base_directory, chat_data, tmp_path, monkeypatch, where, doing
):
    full = torch.OutOfMemoryError("CUDA out of memory")
    if doing == "writing":
        full = OSError(errno.ENOSPC, "No space left on device")

    def fails(*_, **__):
        raise full

    monkeypatch.setattr(f"loraport.training.text.{where}", fails)
    with pytest.raises(LoraportError) as raised:
        train_language_model(str(base_directory), chat_data, tmp_path / "out", OPTIONS)
    what = tmp_path / "out" if doing == "writing" else base_directory
    assert str(raised.value).startswith(f"{doing} {what}: ")
    last = "the last checkpoint is kept: " if doing == "writing" else "there is no checkpoint yet"
    assert f"; {last}" in str(raised.value)


@pytest.mark.parametrize(
    ("options", "offered"),
    [
        (TrainOptions(), "--gradient-checkpointing, --base-dtype nf4, --max-length 21, --rank 8"),
        (
            TrainOptions(packing="fill", gradient_checkpointing=True, checkpointed_layers=1),
            "--checkpointed-layers 2, --base-dtype nf4, --max-length 128, --rank 8",
        ),
    ],
)
def test_what_to_change_is_of_this_base_and_of_these_rows(
    base_directory, chat_data, tmp_path, monkeypatch, options, offered
):
    """A base of two layers and 256 tokens of context, and rows of at most 43."""

    def full(*_):
        raise MemoryError

    monkeypatch.setattr("loraport.training.text.language_model_loss", full)
    options = replace(options, batch_size=1, lora=LoraOptions(rank=16), loop=OPTIONS.loop)
    with pytest.raises(LoraportError) as raised:
        train_language_model(str(base_directory), chat_data, tmp_path / "out", options)
    assert f"; to need less, try {offered}, or a smaller base" in str(raised.value)


def test_a_run_that_needs_less_memory_goes_on_from_its_checkpoint(
    base_directory, chat_data, tmp_path, monkeypatch
):
    """Activations that are computed again change no bit; --resume was refused with them."""
    from loraport.training.base.frozen_base import checkpoint_activations
    from loraport.training.losses.language_model import language_model_loss

    out, whole, calls = tmp_path / "out", tmp_path / "whole", []
    options = replace(OPTIONS, lora=LoraOptions(rank=4, dropout=0.2))
    less = replace(options, gradient_checkpointing=True, checkpointed_layers=1)
    train_language_model(str(base_directory), chat_data, whole, options)

    def run(last, chosen):
        def full(*given, **named):
            calls.append(1)
            if len(calls) > last:
                raise MemoryError
            return language_model_loss(*given, **named)

        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr("loraport.training.text.language_model_loss", full)
            train_language_model(str(base_directory), chat_data, out, chosen, resume=True)

    for last, goes_on in ((2, False), (6, True)):  # checkpoints come every third step
        with pytest.raises(LoraportError) as raised:
            run(last, options)
        said = "--resume goes on with --gradient-checkpointing"
        assert str(raised.value).endswith(f"takes); {said}" if goes_on else "takes)")
        assert ("there is no checkpoint yet" in str(raised.value)) is not goes_on
    again, asked = checkpoint_activations, []
    monkeypatch.setattr(
        "loraport.training.text.checkpoint_activations",
        lambda *given: asked.append(given[1:]) or again(*given),
    )
    run(99, less)
    assert asked == [(1,)]
    for name in ("metrics.jsonl", "adapter_model.safetensors"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name


def test_other_errors_stay_what_they_are(base_directory, chat_data, tmp_path, monkeypatch):
    def wrong(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("loraport.training.text.language_model_loss", wrong)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        train_language_model(str(base_directory), chat_data, tmp_path / "out", OPTIONS)


def test_a_full_disk_keeps_the_last_checkpoint(base_directory, chat_data, tmp_path, monkeypatch):
    from loraport.training.run import checkpoints

    out, whole = tmp_path / "out", tmp_path / "whole"
    write = checkpoints.write_safetensors

    def full(tensors, path, metadata):
        if "00000006" in str(path):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write(tensors, path, metadata)

    monkeypatch.setattr(checkpoints, "write_safetensors", full)
    with pytest.raises(LoraportError, match=r"No space left on device.*is kept.*--resume") as e:
        train_language_model(str(base_directory), chat_data, out, OPTIONS)
    assert str(e.value).startswith("the checkpoint of step 6: expected space to write to")
    assert "checkpoint-00000003" in str(e.value)
    kept = [entry.name for entry in work_directory(out).iterdir() if entry.is_dir()]
    assert kept == ["checkpoint-00000003"]
    monkeypatch.undo()
    train_language_model(str(base_directory), chat_data, out, OPTIONS, resume=True)
    train_language_model(str(base_directory), chat_data, whole, OPTIONS)
    name = "adapter_model.safetensors"
    assert (out / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("validated", [False, True])
def test_metrics_that_find_no_room_are_told_with_their_file_and_step(validated, tmp_path):
    """Writing to /dev/full fails as on a full disk: the system says so, and names no file."""
    path = tmp_path / "metrics.jsonl"
    path.symlink_to("/dev/full")
    model, batches = nn.Sequential(nn.Linear(4, 3)), [torch.ones(2, 4)]
    attach(model, LoraOptions(rank=2))

    def loss(model, batch):
        return model(batch).square().mean()

    held_out = batches if validated else None
    with pytest.raises(LoraportError) as raised:
        train(model, batches, loss, LoopOptions(steps=4), validation=held_out, work=tmp_path)
    doing = "validating after step 0" if validated else "step 1"
    assert str(raised.value).startswith(f"{doing}: expected space to write to {path}, got: No sp")


def test_a_loss_that_is_not_finite_names_the_rows(base_directory, chat_data, tmp_path, monkeypatch):
    from loraport.training.losses.language_model import language_model_loss

    seen = []

    def diverging(model, batch):
        seen.append(batch.lines)
        part = language_model_loss(model, batch)
        return part if len(seen) < 6 else part._replace(total=part.total * float("nan"))

    monkeypatch.setattr("loraport.training.text.language_model_loss", diverging)
    options = TrainOptions(lora=OPTIONS.lora, loop=OPTIONS.loop, validation_share=0)
    with pytest.raises(LoraportError) as raised:
        train_language_model(str(base_directory), chat_data, tmp_path / "out", options)
    lines = ", ".join(map(str, sorted(seen[-1])))
    assert f"step 6: expected a finite loss, got nan in the batch of data lines {lines}; " in str(
        raised.value
    )
    assert "checkpoint-00000003" in str(raised.value)


def test_one_process_per_output(base_directory, chat_data, tmp_path):
    out = tmp_path / "out"
    with only_process(out), pytest.raises(LoraportError, match=f"got process {os.getpid()}"):
        train_language_model(str(base_directory), chat_data, out, OPTIONS)
    train_language_model(str(base_directory), chat_data, out, OPTIONS)  # it is free again
    assert [entry.name for entry in tmp_path.glob(".*")] == []


class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.map = nn.Linear(5, 3)

    def forward(self, x):
        return self.map(x)


def line():
    torch.manual_seed(0)
    model = Line()
    attach(model, LoraOptions(rank=2, targets=("map",)))
    return model


def test_early_stopping_keeps_the_best():
    """Validation losses by hand: the best is at step 4, two validations later it ends."""
    losses = iter([9.0, 5.0, 3.0, 4.0, 3.5, 1.0])
    states = {}

    class Keep(Silent):
        def stepped(self, *, step, **_):
            states[step] = {k: v.clone() for k, v in model.state_dict().items()}

    def loss(model, batch):
        value = model(batch).square().mean()
        return value if torch.is_grad_enabled() else value * 0 + next(losses)

    model = line()
    options = LoopOptions(steps=20, validate_every=2, early_stopping=2, learning_rate=0.05)
    x = torch.randn(4, 5)
    result = train(model, [x], loss, options, validation=[x], observer=Keep())
    assert result.steps == 8
    assert result.kept == (4, 3.0)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, states[4][name])
    # Control: without it the last parameters stay, and they are others.
    assert not torch.equal(states[8]["map.lora_B"], states[4]["map.lora_B"])
    with pytest.raises(LoraportError, match="early_stopping: expected validation batches"):
        train(line(), [x], loss, options)


def test_lora_plus_steps_as_pefts_optimizer():
    """The same steps in float64 from the same start; control: ratio 1 differs."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    x, y = torch.randn(16, 5).double(), torch.randn(16, 3).double()

    def mine(ratio):
        torch.manual_seed(0)
        model = Line().double()
        attach(model, LoraOptions(rank=2, alpha=4, targets=("map",)))
        layer = lora_layers(model)["map"]
        named = {"map.lora_A": layer.lora_A, "map.lora_B": layer.lora_B}
        start = layer.lora_A.detach().clone()
        options = LoopOptions(learning_rate=0.01, lora_plus_ratio=ratio)
        optimizer = make_optimizer(named, options, torch.device("cpu"))
        steps(model, optimizer)
        return start, layer.lora_A, layer.lora_B

    def steps(model, optimizer):
        for _ in range(5):
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()

    start, a, b = mine(16.0)
    torch.manual_seed(0)
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["map"])
    peft = get_peft_model(Line().double(), config, autocast_adapter_dtype=False)
    layer = peft.base_model.model.map
    their_a, their_b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    their_a.data, their_b.data = start.clone(), their_b.data.double()
    optimizer = create_loraplus_optimizer(peft, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16)
    steps(peft, optimizer)
    torch.testing.assert_close(a, their_a, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(b, their_b, rtol=1e-9, atol=1e-12)
    _, _, plain = mine(1.0)
    assert (plain - b).abs().max() > 1e-2


def test_lora_plus_gives_embeddings_the_rates_of_any_layer():
    """Adam's first step moves each number by the rate; control: PEFT moves both by 1e-6."""
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_loraplus_optimizer

    def moved(model, optimizer, a, b):
        with torch.no_grad():
            for matrix in (a, b):
                matrix.copy_(torch.linspace(0.5, 1, matrix.numel()).view_as(matrix))
        before = [a.detach().clone(), b.detach().clone()]
        model(torch.arange(7)).square().sum().backward()
        optimizer.step()
        return [(was - now).abs() for was, now in zip(before, (a, b), strict=True)]

    model = nn.Sequential(nn.Embedding(7, 5)).double()
    layer = attach(model, LoraOptions(rank=2, targets=("0",)))["0"]
    named = {"0.lora_A": layer.lora_A, "0.lora_B": layer.lora_B}
    options = LoopOptions(learning_rate=0.01, lora_plus_ratio=16)
    mine = make_optimizer(named, options, torch.device("cpu"))
    for change, rate in zip(
        moved(model, mine, layer.lora_A, layer.lora_B), (0.01, 0.16), strict=True
    ):
        torch.testing.assert_close(change, torch.full_like(change, rate), rtol=1e-6, atol=0)
    config = LoraConfig(r=2, target_modules=["0"])
    peft = get_peft_model(nn.Sequential(nn.Embedding(7, 5)), config).double()
    layer = peft.base_model.model[0]
    matrices = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    theirs = create_loraplus_optimizer(peft, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16)
    for change in moved(peft, theirs, *matrices):
        torch.testing.assert_close(change, torch.full_like(change, 1e-6), rtol=1e-6, atol=0)
