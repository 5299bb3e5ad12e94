"""The loop on small modules that are no language models."""

import copy
import json
import math
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from loraport.errors import LoraportError
from loraport.training import LoopOptions, LoraOptions, LossSum, attach, lora_layers, train
from loraport.training.losses.loss import as_sum
from loraport.training.run import loop
from loraport.training.run.observer import Silent
from loraport.training.run.schedule import learning_rate


class ConvNet(nn.Module):
    """A small image classifier with batch normalisation."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x):  # [batch, 1, 8, 8]
        return self.head(F.relu(self.norm(self.conv(x))).amax(dim=(2, 3)))


def images(count=24):
    torch.manual_seed(7)
    kinds = torch.arange(count) % 3
    x = torch.randn(count, 1, 8, 8) * 0.1
    x[kinds == 1, :, 3] += 1  # a horizontal bar
    x[kinds == 2, :, :, 4] += 1  # a vertical one
    return x, kinds


def classify(model, batch):
    x, kinds = batch
    return F.cross_entropy(model(x), kinds)


def conv_net(**options):
    torch.manual_seed(0)
    model = ConvNet()
    attach(model, LoraOptions(**{"rank": 4, "targets": ("conv", "head"), **options}))
    return model


def test_trains_any_module_with_any_loss():
    x, kinds = images()
    batches = [(x[i : i + 8], kinds[i : i + 8]) for i in range(0, 24, 8)]
    model = conv_net()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    options = LoopOptions(learning_rate=0.03, epochs=20, weight_decay=0.01)
    result = train(model, batches, classify, options, validation=batches)
    assert result.steps == 60
    (first_step, first), (last_step, last) = result.validations[0], result.validations[-1]
    assert (first_step, last_step) == (0, 60)
    assert last < 0.5 * first
    # Nothing but the LoRA matrices moved: no weight, no running statistics.
    moved = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert moved == {f"{name}.lora_{x}" for name in ("conv", "head") for x in "AB"}


def test_the_base_gets_no_gradient_and_no_optimizer_state(monkeypatch):
    model = conv_net()
    made = []
    make = torch.optim.AdamW
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda *args, **kw: made.append(make(*args, **kw)) or made[-1]
    )
    train(model, [images()], classify, LoopOptions(steps=2))
    layers = lora_layers(model)
    matrices = {id(m) for layer in layers.values() for m in (layer.lora_A, layer.lora_B)}
    (optimizer,) = made
    assert {id(p) for p in optimizer.state} == matrices
    for parameter in model.parameters():
        if id(parameter) in matrices:
            assert parameter.grad is not None
        else:
            assert parameter.grad is None
            assert not parameter.requires_grad


def test_a_trainable_base_or_no_lora_is_refused():
    with pytest.raises(LoraportError, match="expected LoRA layers, got none"):
        train(ConvNet(), [images()], classify)
    model = conv_net()
    model.norm.weight.requires_grad_(True)
    with pytest.raises(LoraportError, match=r"got trainable norm.weight"):
        train(model, [images()], classify)


def test_accumulated_batches_equal_the_big_batch():
    """Batches of unlike size, weighed by what they hold; float64, so only rounding differs."""
    x, kinds = images(21)
    x = x.double()

    def summed(model, batch):
        value = F.cross_entropy(model(batch[0]), batch[1], reduction="sum")
        return LossSum(value, len(batch[1]))

    def trained(batches, accumulate, loss=summed):
        torch.manual_seed(0)
        model = ConvNet().double()
        attach(model, LoraOptions(rank=3, targets=("conv", "head")))
        options = LoopOptions(steps=5, accumulate=accumulate, clip=0.1, learning_rate=0.01)
        result = train(model, batches, loss, options)
        return result, model.state_dict()

    parts = [(x[a:b], kinds[a:b]) for a, b in ((0, 3), (3, 15), (15, 21))]
    big, expected = trained([(x, kinds)], 1)
    small, got = trained(parts, 3)
    for (_, left), (_, right) in zip(big.losses, small.losses, strict=True):
        assert left == pytest.approx(right, rel=1e-12)
    for name, tensor in expected.items():
        torch.testing.assert_close(got[name], tensor, rtol=1e-9, atol=1e-12)
    # Control: means of unlike batches are not the big batch's mean.
    other, _ = trained(parts, 3, classify)
    assert other.losses[0][1] != pytest.approx(big.losses[0][1], rel=1e-6)


def test_steps_equal_a_plain_torch_loop():
    """AdamW, clipping and schedule against torch's own, written out."""
    x, kinds = images()
    model = conv_net(dropout=0.0)
    other = copy.deepcopy(model)
    options = LoopOptions(steps=6, learning_rate=0.02, weight_decay=0.1, clip=0.05, warmup=0.34)
    train(model, [(x, kinds)], classify, options)
    parameters = [p for p in other.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.02, weight_decay=0.1)
    other.train()
    other.norm.eval()
    for rate in (0.01, 0.02, *(0.01 * (1 + math.cos(math.pi * n / 5)) for n in (1, 2, 3, 4))):
        optimizer.zero_grad()
        classify(other, (x, kinds)).backward()
        nn.utils.clip_grad_norm_(parameters, 0.05)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
    for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-7, msg=name)


def test_schedule_has_no_warmup_without_steps_for_it():
    assert learning_rate(1, 1, 1.0, 0.05) == pytest.approx(0.5)
    assert learning_rate(1, 100, 2.0, 0.1) == pytest.approx(0.2)
    assert learning_rate(10, 100, 2.0, 0.1) == 2.0
    assert 0 < learning_rate(100, 100, 2.0, 0.1) < 0.01


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(tmp_path, value):
    calls = []

    def diverging(model, batch):
        calls.append(1)
        return classify(model, batch) * (value if len(calls) == 5 else 1)

    model = conv_net()
    with pytest.raises(LoraportError, match=r"step 5: expected a finite loss, got (nan|inf)") as e:
        train(model, [images()], diverging, LoopOptions(steps=9, save_every=2), work=tmp_path)
    assert "checkpoint-00000004" in str(e.value)
    assert (tmp_path / "checkpoint-00000004").is_dir()
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("at", "kept"), [(0, "no checkpoint yet"), (5, "checkpoint-00000004")])
def test_a_validation_loss_that_is_not_finite_leaves_no_result(tmp_path, at, kept):
    """The last step's training loss is taken before it changes anything."""

    def burst(model, batch):
        value = classify(model, batch)
        return value if torch.is_grad_enabled() or validated.pop(0) != at else value * math.nan

    validated = [0, 5]
    options = LoopOptions(steps=5, save_every=2)
    batches, held_out = [images()] * 5, [images()]
    with pytest.raises(LoraportError, match=f"step {at}: expected a finite validation loss") as e:
        train(conv_net(), batches, burst, options, validation=held_out, work=tmp_path)
    assert kept in str(e.value)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_early_stopping_ends_where_a_validation_loss_is_not_finite_and_keeps_the_best(value):
    losses = iter([9.0, 6.0, 5.0, value, 1.0])

    def loss(model, batch):
        value = classify(model, batch)
        return value if torch.is_grad_enabled() else value * 0 + next(losses)

    class Notes(Silent):
        def note(self, text):
            notes.append(text)

    notes: list[str] = []
    options = LoopOptions(steps=9, validate_every=1, early_stopping=3)
    model, best = conv_net(), conv_net()
    result = train(model, [images()], loss, options, validation=[images()], observer=Notes())
    assert (result.steps, result.kept) == (3, (2, 5.0))
    ends = f"the validation loss is {value}; training ends, and the adapter of step 2 is kept"
    assert notes == [f"step 3: {ends}"]
    losses = iter([9.0, 6.0, 5.0, value])
    stopped_there = LoopOptions(steps=9, validate_every=1, early_stopping=1)
    train(best, [images()], loss, stopped_there, validation=[images()])
    for name, tensor in best.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)


def test_early_stopping_ends_where_a_training_loss_is_not_finite_and_keeps_the_best():
    """Control: without early stopping, nothing is the best that could be kept."""

    def run(model, options, **others):
        validated, calls = iter([9.0, 6.0, 5.0, 7.0, 8.0]), []

        def loss(model, batch):
            value = classify(model, batch)
            if not torch.is_grad_enabled():
                return value * 0 + next(validated)
            calls.append(1)
            return value * math.nan if len(calls) == 4 else value

        return train(model, [images()], loss, options, validation=[images()], **others)

    class Notes(Silent):
        def note(self, text):
            notes.append(text)

    notes: list[str] = []
    model, best = conv_net(), conv_net()
    options = LoopOptions(steps=9, validate_every=1, early_stopping=3)
    result = run(model, options, observer=Notes())
    assert (result.steps, result.kept) == (3, (2, 5.0))
    ends = "training ends, and the adapter that was best is kept"
    assert notes == [f"step 4: expected a finite loss, got nan; {ends}"]
    run(best, replace(options, early_stopping=1))
    for name, tensor in best.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor, rtol=0, atol=0)
    with pytest.raises(LoraportError, match="step 4: expected a finite loss, got nan; lower the"):
        run(conv_net(), replace(options, early_stopping=0))


def test_what_ended_where_a_loss_was_not_finite_ends_there_again(tmp_path):
    """Stopped before its result was written, it does not go on behind the batch it ended with."""
    parts = [tuple(tensor[at : at + 4] for tensor in images()) for at in range(0, 24, 4)]
    spoiled = (torch.full_like(parts[3][0], math.nan), parts[3][1])
    batches = [*parts[:3], spoiled, *parts[4:]]
    options = LoopOptions(epochs=2, validate_every=2, early_stopping=3, save_every=2)

    def run(resume):
        model = conv_net(dropout=0.2)
        validation = {"validation": parts[:1], "work": tmp_path, "resume": resume}
        return train(model, batches, classify, options, **validation), model.state_dict()

    (first, state), lines = run(resume=False), (tmp_path / "metrics.jsonl").read_bytes()
    assert first.steps == 3
    again, state_again = run(resume=True)
    assert again == first
    assert (tmp_path / "metrics.jsonl").read_bytes() == lines
    assert all(torch.equal(state_again[name], tensor) for name, tensor in state.items())


def test_metrics_are_json_where_a_validation_loss_is_not_finite(tmp_path):
    """JSON has no NaN; a resumed run reads what stands there instead."""

    def loss(model, batch):
        value = classify(model, batch)
        return value if torch.is_grad_enabled() else value * 0 + next(losses)

    def refuse(constant):
        raise AssertionError(f"no JSON: {constant}")

    losses = iter([9.0, 6.0, math.nan])
    options = LoopOptions(steps=9, validate_every=1, early_stopping=3, save_every=1)
    arguments = ([images()], loss, options)
    first = train(conv_net(), *arguments, validation=[images()], work=tmp_path)
    text = (tmp_path / "metrics.jsonl").read_text()
    lines = [json.loads(line, parse_constant=refuse) for line in text.splitlines()]
    assert lines[-1] == {"step": 2, "validation_loss": None}
    again = train(conv_net(), *arguments, validation=[images()], work=str(tmp_path), resume=True)
    assert math.isnan(again.validations[-1][1])
    assert again.validations[:-1] == first.validations[:-1]
    assert (again.steps, again.kept, again.losses) == (first.steps, first.kept, first.losses)


@pytest.mark.parametrize(
    ("loss", "reason"),
    [
        (lambda model, batch: model(batch[0]), "expected a scalar tensor"),
        (lambda model, batch: LossSum(classify(model, batch), 0), "weight above 0"),
        (lambda model, batch: classify(model, batch).detach(), "without gradient"),
    ],
)
def test_bad_losses(loss, reason):
    with pytest.raises(LoraportError, match=reason):
        train(conv_net(), [images()], loss, LoopOptions(steps=1))
    assert as_sum(torch.tensor(1.0)).weight == 1


def test_batches_that_end_or_have_no_length():
    one_shot = iter([images()] * 3)
    with pytest.raises(LoraportError, match="expected a length"):
        train(conv_net(), one_shot, classify)
    with pytest.raises(LoraportError, match="expected some in epoch 2, got none"):
        train(conv_net(), one_shot, classify, LoopOptions(steps=9))
    with pytest.raises(LoraportError, match="expected some, got none"):
        train(conv_net(), [images()], classify, validation=[])


def test_layers_that_take_no_part_are_told():
    notes = []

    class Watch(Silent):
        def note(self, text):
            notes.append(text)

    model = ConvNet()
    model.unused = nn.Linear(3, 2)
    attach(model, LoraOptions(rank=2))
    train(model, [images()], classify, LoopOptions(steps=1), observer=Watch())
    assert notes == [
        "1 of 2 LoRA layers took no part in the first step and learn nothing unless others "
        "reach them: unused"
    ]


def test_modes_and_random_state_are_left_alone_by_validation():
    data = images()
    options = LoopOptions(steps=4, validate_every=1)
    with_validation, without = conv_net(dropout=0.3), conv_net(dropout=0.3)
    with_validation.eval()
    result = train(with_validation, [data], classify, options, validation=[data])
    train(without, [data], classify, options)
    assert [step for step, _ in result.validations] == [0, 1, 2, 3, 4]
    assert not any(module.training for module in with_validation.modules())
    for left, right in zip(with_validation.parameters(), without.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_device_that_is_not_there():
    with pytest.raises(LoraportError, match="expected a device of this machine"):
        train(conv_net(), [images()], classify, LoopOptions(steps=1, device="cuda:77"))


def test_bfloat16_autocast_trains_float32_matrices():
    data = images()
    model = conv_net()
    options = LoopOptions(steps=30, learning_rate=0.03, dtype="bfloat16")
    result = train(model, [data], classify, options)
    assert result.losses[-1][1] < 0.7 * result.losses[0][1]
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("stop", [1, 4, 5, 7])
def test_a_shuffling_loader_resumes_exactly(tmp_path, stop):
    """A DataLoader draws its order from torch's global generator; dropout does so too."""

    def loader():
        return DataLoader(TensorDataset(*images()), batch_size=5, shuffle=True)

    class Stop(Exception):
        pass

    def run(work, fail_at=None, resume=False):
        calls = []

        def loss(model, batch):
            calls.append(1)
            if len(calls) == fail_at:
                raise Stop
            return classify(model, batch)

        model = conv_net(dropout=0.2)
        # 5 batches an epoch; a checkpoint at every step, so at the end of an epoch too.
        options = LoopOptions(epochs=2, save_every=1, clip=0)
        result = train(
            model, loader(), loss, options, validation=[images()], work=work, resume=resume
        )
        return result, model.state_dict()

    expected, expected_state = run(tmp_path / "whole")
    with pytest.raises(Stop):
        run(tmp_path / "parts", fail_at=stop + 2)  # the first call is the base's validation
    assert len(list((tmp_path / "parts").glob("checkpoint-*"))) == min(stop, 2)
    got, state = run(tmp_path / "parts", resume=True)
    assert got == expected
    assert all(torch.equal(state[name], tensor) for name, tensor in expected_state.items())
    lines = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("whole", "parts")]
    assert lines[0] == lines[1]


def test_nothing_of_a_batch_outlives_it():
    """Its graph would keep what it saved, and hold on to what is recorded next."""
    attach(model := ConvNet(), LoraOptions(rank=2))
    alive = []

    class Saved:
        pass

    class Holds(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.saved = Saved()
            alive.append(weakref.ref(ctx.saved))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            assert ctx.saved is alive[-1]()
            return gradient

    def loss(model, batch):
        assert [saved() for saved in alive] == [None] * len(alive)
        x, kinds = batch
        return F.cross_entropy(Holds.apply(model(x)), kinds)

    x, kinds = images()
    batches = [(x[i : i + 6], kinds[i : i + 6]) for i in range(0, 24, 6)]
    train(model, batches, loss, LoopOptions(steps=2, accumulate=2, device="cpu"))
    assert len(alive) == 4


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_device_told_ahead_steps_as_others_and_not_where_the_loss_is_not_finite(
    value, monkeypatch
):
    """As a GPU is, whose host reads a step's loss after the step: nothing else may differ."""
    batches = [images()] * 3
    seen = []

    def diverging(model, batch):
        seen.append({n: p.detach().clone() for n, p in model.named_parameters()})
        part = as_sum(classify(model, batch))
        return part if len(seen) < 5 else part._replace(total=part.total * value)

    def run(steps):
        seen.clear()
        model = conv_net()
        result = train(model, batches, diverging, LoopOptions(steps=steps, device="cpu"))
        return result.losses, dict(model.named_parameters())

    expected, matrices = run(4)
    monkeypatch.setattr(loop._Run, "ahead", True)
    got, same = run(4)
    assert got == expected
    assert all(torch.equal(matrices[name], value) for name, value in same.items())
    seen.clear()
    model = conv_net()
    with pytest.raises(LoraportError, match="step 5: expected a finite loss"):
        train(model, batches, diverging, LoopOptions(steps=9, device="cpu"))
    assert all(torch.equal(seen[4][n], p) for n, p in model.named_parameters())
    assert not all(torch.equal(seen[3][n], p) for n, p in model.named_parameters())
