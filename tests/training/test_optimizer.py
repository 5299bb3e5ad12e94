"""AdamW with its state in 8 bits: near AdamW's course, resumed bit for bit."""

import math

import pytest
import torch
from torch import nn

from loraport.errors import LoraportError
from loraport.training import LoopOptions, LoraOptions, attach, train
from loraport.training.run.checkpoints import last_checkpoint, load_checkpoint
from loraport.training.run.optimizer import make_optimizer, step_where_finite

bitsandbytes = pytest.importorskip("bitsandbytes")

STEPS, WIDTH, RANK = 6, 600, 8  # matrices of 4800 numbers: enough for 8 bits


def perceptron():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 5))


def batches():
    numbers = torch.Generator().manual_seed(1)
    x = torch.randn(STEPS, 16, WIDTH, generator=numbers)
    return [(part, part[:, :5].sign()) for part in x]


def loss(model, batch):
    x, y = batch
    return nn.functional.mse_loss(model(x), y)


def trained(optimizer="adamw-8bit", *, steps=STEPS, fail_at=None, ratio=1.0, **more):
    class Stop(Exception):
        pass

    calls = []

    def counted(model, batch):
        calls.append(1)
        if len(calls) == fail_at:
            raise Stop
        return loss(model, batch)

    model = perceptron()
    attach(model, LoraOptions(rank=RANK))
    options = LoopOptions(
        learning_rate=0.01,
        steps=steps,
        warmup=0.0,
        weight_decay=0.1,
        lora_plus_ratio=ratio,
        save_every=2,
        device="cpu",
        optimizer=optimizer,
    )
    try:
        result = train(model, batches(), counted, options, **more)
    except Stop:
        return None, None
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    return parameters, [value for _, value in result.losses]


@pytest.mark.parametrize("ratio", [1.0, 4.0])
def test_a_run_resumed_equals_one_never_stopped(tmp_path, monkeypatch, ratio):
    expected, losses = trained(ratio=ratio)
    work = tmp_path / "work"
    trained(ratio=ratio, fail_at=5, work=work)
    _, state = load_checkpoint(last_checkpoint(work))
    kinds = {key: tensor.dtype for key, tensor in state.optimizer["0.lora_A"].items()}
    assert kinds["state1"] is kinds["state2"] is torch.uint8
    got, rest = trained(ratio=ratio, work=work, resume=True)
    assert rest[-2:] == losses[-2:]
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name
    # The control: without the moments the next steps are others.
    monkeypatch.setattr("loraport.training.run.loop.restore_optimizer", lambda *_: None)
    again = tmp_path / "again"
    trained(ratio=ratio, fail_at=5, work=again)
    other, _ = trained(ratio=ratio, work=again, resume=True)
    assert not torch.equal(other["0.lora_A"], expected["0.lora_A"])


def test_its_course_is_near_that_of_32_bits():
    plain, plain_losses = trained("adamw")
    small, small_losses = trained("adamw-8bit")
    assert small_losses == pytest.approx(plain_losses, rel=0.02)
    moved = plain["0.lora_B"].norm()
    difference = (small["0.lora_B"] - plain["0.lora_B"]).norm()
    assert 0 < difference < 0.1 * moved
    assert plain_losses[-1] < plain_losses[0]


def test_paged_needs_a_gpu_and_says_so():
    parameters = {"a.lora_A": nn.Parameter(torch.ones(2, 2))}
    options = LoopOptions(optimizer="paged-adamw-8bit")
    with pytest.raises(LoraportError, match=r"expected a CUDA GPU.*use adamw-8bit"):
        make_optimizer(parameters, options, torch.device("cpu"))


def test_a_name_it_does_not_know():
    with pytest.raises(LoraportError, match="optimizer: expected adamw, adamw-8bit or paged"):
        LoopOptions(optimizer="sgd")


def test_a_step_is_taken_only_where_all_is_finite():
    """Without the host having looked: matrices, moments and the count of steps stay."""
    torch.manual_seed(0)
    options = LoopOptions(learning_rate=0.1)

    def made():
        parameter = nn.Parameter(torch.linspace(-1, 1, 12).reshape(3, 4))
        optimizer = make_optimizer({"x.lora_A": parameter}, options, torch.device("cpu"))
        return parameter, optimizer

    plain, guarded = made(), made()
    for turn in range(4):
        gradient = torch.randn(3, 4)
        for parameter, _ in (plain, guarded):
            parameter.grad = gradient.clone()
        plain[1].step()
        step_where_finite(guarded[1], torch.tensor([float(turn), 2.0]))
        before = guarded[0].detach().clone()
        state = {k: v.clone() for k, v in guarded[1].state[guarded[0]].items()}
        for bad in (math.nan, math.inf, -math.inf):
            guarded[0].grad = torch.full((3, 4), bad)
            step_where_finite(guarded[1], torch.tensor([1.0, bad]))
        assert torch.equal(guarded[0], before)
        assert all(torch.equal(guarded[1].state[guarded[0]][k], v) for k, v in state.items())
    assert torch.equal(guarded[0], plain[0])
    assert not torch.equal(guarded[0], torch.linspace(-1, 1, 12).reshape(3, 4))
