"""Recorded passes, up to CUDA itself: what is recorded, what is copied, where gradients go.

A recorder that runs again what it was given stands for a GPU's; the GPU's own is in ``tests/cuda``.
"""

import contextlib
import io
from dataclasses import replace
from functools import partial

import pytest
import torch
from rich.console import Console

from loraport.errors import LoraportError
from loraport.training import (
    LoopOptions,
    LoraOptions,
    TrainOptions,
    adapter_of,
    attach,
    train,
    train_language_model,
)
from loraport.training.data.batches import IGNORED, Row, collate
from loraport.training.data.end_to_end import lay_end_to_end
from loraport.training.data.model_inputs import Shortcuts, assume_shortcuts
from loraport.training.data.packing import make_batches
from loraport.training.kernels import cuda_graphs, recorder
from loraport.training.kernels.cuda_graphs import (
    RecordedPasses,
    asked_to_record,
    why_not_recorded,
)
from loraport.training.losses.language_model import language_model_loss
from loraport.training.report import ProgressReport, summary_table


class Replays:
    """Counts recordings and replays."""

    def __init__(self, *, ahead=True, room=True):
        self.recorded, self.replayed, self.inside = 0, 0, False
        self.tried, self.ahead, self.room = 0, ahead, room

    def runs_ahead(self, run):
        self.tried += 1
        run()
        return self.ahead

    def has_room(self):
        return self.room

    def __call__(self, run):
        self.recorded += 1

        def replay():
            self.replayed += 1
            with torch.enable_grad(), torch.autocast("cpu", **state):
                run()

        assert self.inside
        # As it is recorded so it is repeated, whatever is switched on then.
        state = {"dtype": torch.get_autocast_dtype("cpu")}
        state["enabled"] = torch.is_autocast_enabled("cpu")
        assert not (state["enabled"] and torch.is_autocast_cache_enabled())
        run()  # as in a recording: Python runs, though nothing is computed
        return replay

    @contextlib.contextmanager
    def stream(self):
        self.inside = True
        yield
        self.inside = False


def rows(count, seed=0):
    numbers = torch.Generator().manual_seed(seed)
    made = []
    for index in range(count):
        tokens = tuple(torch.randint(250, (6 + 5 * (index % 4),), generator=numbers).tolist())
        made.append(Row(tokens, (IGNORED,) * 3 + tokens[3:]))
    return made


def trained(model, lora, packing, loop, recorded=None, *, few=False):
    torch.manual_seed(0)
    attach(model, lora)
    batches = make_batches(
        model, rows(16), 4, 0, 0, packing=packing, max_length=64, few_lengths=few
    )
    hidden = None if recorded is None else RecordedPasses(model, recorded)
    with hidden.stream() if hidden else contextlib.nullcontext():
        result = train(model, batches, partial(language_model_loss, hidden=hidden), loop)
    return [loss for _, loss in result.losses], adapter_of(model)


@pytest.mark.parametrize("packing", ["auto", "fill", "none"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("lora", [LoraOptions(rank=4), LoraOptions(rank=4, use_dora=True)])
def test_the_same_losses_and_matrices(llama, fresh, packing, dtype, lora):
    loop = LoopOptions(steps=10, accumulate=2, learning_rate=0.02, device="cpu", dtype=dtype)
    expected, mine = trained(llama, lora, packing, loop, few=True)
    replays = Replays()
    got, other = trained(fresh, lora, packing, loop, replays, few=True)
    assert got == expected
    assert replays.recorded >= 2
    assert replays.replayed > 2 * replays.recorded
    for path, module in mine.modules.items():
        assert torch.equal(module.lora_A, other.modules[path].lora_A)
        assert torch.equal(module.lora_B, other.modules[path].lora_B)
    assert expected[-1] < expected[0] - 0.05


def test_rows_of_any_layout_come_in_few_shapes_that_are_recorded_at_second_sight(llama):
    attach(llama, LoraOptions(rank=4))
    replays = Replays()
    recorded = RecordedPasses(llama, replays)
    batches = make_batches(
        llama, rows(40), 4, 0, 0, packing="auto", max_length=64, few_lengths=True
    )
    seen = [tuple(b.tokens.shape) for number in range(3) for b in batches.epoch(number)]
    assert len(set(seen)) <= 16
    loss = partial(language_model_loss, hidden=recorded)
    with recorded.stream():
        train(llama, batches, loss, LoopOptions(steps=30, device="cpu"))
    again = [shape for shape in set(seen) if seen.count(shape) > 1]
    assert replays.recorded == 2 * len(again)  # a forward and a backward pass
    assert replays.replayed == 2 * (len(seen) - len(set(seen)))


def test_another_run_of_the_same_model_is_recorded_anew(llama, fresh):
    """Its rounded matrices are others, which gradients have to reach."""
    loop = LoopOptions(steps=8, learning_rate=0.02, device="cpu", dtype="bfloat16")
    lora = LoraOptions(rank=4)
    expected, _ = trained(fresh, lora, "auto", loop, few=True)
    replays = Replays()
    attach(llama, lora)
    recorded = RecordedPasses(llama, replays)
    batches = make_batches(
        llama, rows(16), 4, 0, 0, packing="auto", max_length=64, few_lengths=True
    )
    before = [p.detach().clone() for p in llama.parameters()]
    loss = partial(language_model_loss, hidden=recorded)
    with recorded.stream():
        train(llama, batches, loss, loop)
        once = replays.recorded
        for parameter, value in zip(llama.parameters(), before, strict=True):
            parameter.data.copy_(value)
        again = train(llama, batches, loss, loop)
    assert replays.recorded == 2 * once > 0
    assert [value for _, value in again.losses] == expected


def test_validation_other_batches_and_other_models_are_not_recorded(llama, fresh):
    replays = Replays()
    attach(llama, LoraOptions(rank=4))
    recorded = RecordedPasses(llama, replays)
    batch = lay_end_to_end([rows(4)], 0).to(torch.device("cpu"))
    padded = collate(rows(4), 0).to(torch.device("cpu"))
    with recorded.stream():
        for _ in range(3):
            with torch.no_grad():
                language_model_loss(llama, batch, recorded)
            language_model_loss(llama, padded, recorded)
            language_model_loss(fresh, batch, recorded)
    assert (replays.recorded, replays.replayed) == (0, 0)


class Fails(Replays):
    """As a recording ends in which something was done that cannot be."""

    def __init__(self, error, *, ends_well):
        super().__init__()
        self.error, self.ends_well = error, ends_well

    def __call__(self, run):
        run()
        try:
            raise self.error
        except RuntimeError:
            if self.ends_well:
                raise
            raise RuntimeError("recording ended")  # noqa: B904  as torch does


@pytest.mark.parametrize("ends_well", [True, False])
@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (
            RuntimeError("not while a stream is captured\nmore"),
            LoraportError,
            r"--cuda-graphs: a pass of LlamaForCausalLM cannot be recorded: not while a stream is "
            "captured; use --no-cuda-graphs",
        ),
        (torch.OutOfMemoryError("CUDA out of memory"), torch.OutOfMemoryError, "out of memory"),
    ],
)
def test_what_cannot_be_recorded_says_so(llama, error, expected, message, ends_well):
    attach(llama, LoraOptions(rank=4))
    recorded = RecordedPasses(llama, Fails(error, ends_well=ends_well))
    batch = lay_end_to_end([rows(4)], 0).to(torch.device("cpu"))
    with recorded.stream():
        language_model_loss(llama, batch, recorded)
        with pytest.raises(expected, match=message):
            language_model_loss(llama, batch, recorded)


def test_models_and_devices_that_cannot_be_recorded_are_refused(llama, monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    asked = TrainOptions(cuda_graphs=True)
    with pytest.raises(LoraportError, match="expected a CUDA GPU, got cpu; leave out"):
        asked_to_record(cpu, asked)
    for other in ("gradient_checkpointing", "compile"):
        flag = f"--{other.replace('_', '-')}"
        with pytest.raises(LoraportError, match=f"expected no {flag} beside it"):
            asked_to_record(cuda, replace(asked, **{other: True}))
        assert not asked_to_record(cuda, TrainOptions(**{other: True}))
    assert asked_to_record(cuda, asked)
    assert asked_to_record(cuda, asked, processes=2)
    assert asked_to_record(cuda, TrainOptions())
    assert not asked_to_record(cpu, TrainOptions())
    assert not asked_to_record(cuda, TrainOptions(), processes=2)
    assert not asked_to_record(cuda, TrainOptions(base_dtype="nf4"))
    assert not asked_to_record(cuda, TrainOptions(cuda_graphs=False))
    assert why_not_recorded(llama, 1000) is None
    windowed = Shortcuts(padding_unseen=True, rows_apart=True, longest=20)
    for able, message in (
        (replace(windowed, rows_apart=False), "got LlamaForCausalLM"),
        (windowed, "got one whose attention window is 20 tokens, and a row of 21"),
    ):
        assume_shortcuts(llama, able)
        assert message in why_not_recorded(llama, 21)
        for packing in ("auto", "none"):
            layout = {"packing": packing, "max_length": 64, "few_lengths": True}
            with pytest.raises(LoraportError, match=f"--cuda-graphs: .*{message}; use --no"):
                make_batches(llama, rows(4), 4, 0, 0, **layout)
    monkeypatch.setattr(cuda_graphs, "logit_transform", lambda *_: None)
    with pytest.raises(LoraportError, match="--cuda-graphs: expected a model whose output head"):
        RecordedPasses(llama, Replays())
    assert "output head can be told apart" in why_not_recorded(llama, 1)


@pytest.mark.parametrize(
    ("replays", "tried", "told"),
    [
        (Replays(), 1, None),
        (Replays(ahead=False), 1, "not recorded (CUDA graphs): a pass of LlamaForCausalLM waits"),
        (Replays(room=False), 1, "passes of 0 shapes of batches are recorded (CUDA graphs), the"),
    ],
)
def test_where_nothing_is_asked_what_may_fail_is_not_recorded(llama, fresh, replays, tried, told):
    """One pass more is tried, which changes neither what is dropped out nor gradients."""
    notes = []
    records = told is None
    # What stands for a recorder here draws numbers while it records.
    lora = LoraOptions(rank=4, dropout=0.0 if records else 0.3)
    loop = LoopOptions(steps=10, learning_rate=0.02, device="cpu")
    layout = {"packing": "auto", "max_length": 64, "few_lengths": True}

    def losses(model, record):
        torch.manual_seed(0)
        attach(model, lora)
        hidden = record and RecordedPasses(model, record, tentative=True, note=notes.append)
        loss = partial(language_model_loss, hidden=hidden)
        with hidden.stream() if hidden else contextlib.nullcontext():
            return train(model, make_batches(model, rows(16), 4, 0, 0, **layout), loss, loop).losses

    assert losses(llama, replays) == losses(fresh, None)
    assert replays.tried == tried
    assert bool(replays.recorded) is records
    assert len(notes) == (0 if records else 1)
    assert records or told in notes[0]


@pytest.mark.parametrize("able", [True, False])
def test_the_command_records_by_itself_where_it_can(
    base_directory, chat_data, tmp_path, monkeypatch, able
):
    replays = Replays()
    monkeypatch.setattr(recorder, "_OnGpu", lambda _: replays)
    monkeypatch.setattr("loraport.training.text.asked_to_record", lambda *_: True)
    if not able:
        monkeypatch.setattr("loraport.training.text.why_not_recorded", lambda *_: "it mixes rows")
    options = TrainOptions(
        lora=LoraOptions(rank=4), loop=LoopOptions(steps=12, learning_rate=0.02, device="cpu")
    )
    written = io.StringIO()
    report = ProgressReport(Console(file=written))
    out = tmp_path / "out"
    found = train_language_model(str(base_directory), chat_data, out, options, observer=report)
    assert ("passes are not recorded (CUDA graphs): it mixes rows" in written.getvalue()) != able
    assert found.recorded_passes == (replays.recorded / 2 if able else 0)  # forward and backward
    Console(file=written).print(summary_table(found))
    assert ("shapes of batches recorded" in written.getvalue()) == able
    assert (replays.tried, bool(replays.replayed)) == ((1, True) if able else (0, False))
    assert found.validation_loss < found.base_validation_loss - 0.1


def test_the_command_records_and_learns_the_same(base_directory, chat_data, tmp_path, monkeypatch):
    """Padding to few lengths changes nothing that is learned."""
    loop = LoopOptions(steps=12, learning_rate=0.02, device="cpu")
    options = TrainOptions(lora=LoraOptions(rank=4), loop=loop)
    arguments = (str(base_directory), chat_data)
    plain = train_language_model(*arguments, tmp_path / "plain", options)
    with pytest.raises(LoraportError, match="--cuda-graphs: expected a CUDA GPU, got cpu"):
        train_language_model(*arguments, tmp_path / "out", replace(options, cuda_graphs=True))
    assert not (tmp_path / "out.training").exists()
    replays = Replays()
    monkeypatch.setattr(recorder, "_OnGpu", lambda _: replays)
    monkeypatch.setattr("loraport.training.text.asked_to_record", lambda *_: True)
    found = train_language_model(*arguments, tmp_path / "out", replace(options, cuda_graphs=True))
    assert replays.replayed > replays.recorded > 0
    assert not replays.inside
    assert found.validation_loss == pytest.approx(plain.validation_loss, abs=1e-5)
    assert found.training_loss == pytest.approx(plain.training_loss, abs=1e-5)
    assert found.validation_loss < found.base_validation_loss - 0.1


def test_memory_that_runs_out_while_recording_says_what_to_change(
    base_directory, chat_data, tmp_path, monkeypatch
):
    full = Fails(torch.OutOfMemoryError("CUDA out of memory"), ends_well=False)
    monkeypatch.setattr(recorder, "_OnGpu", lambda _: full)
    monkeypatch.setattr("loraport.training.text.asked_to_record", lambda *_: True)
    options = TrainOptions(loop=LoopOptions(steps=12, device="cpu"), cuda_graphs=True)
    with pytest.raises(LoraportError, match=r"memory.*to need less, try .*, --no-cuda-graphs, "):
        train_language_model(str(base_directory), chat_data, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()
