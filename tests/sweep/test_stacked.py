"""Matrices of several candidates, rounded for all layers at once, give what each layer gives."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from loraport.sweep.layers import attach_candidates
from loraport.sweep.loss import grouped_language_model_loss
from loraport.sweep.together import train_together
from loraport.sweep.trial import Trial
from loraport.training import LoopOptions, LoraOptions, attach, train
from loraport.training.data.batches import collate
from loraport.training.lora.rounded import RoundedMatrices
from loraport.training.losses.language_model import language_model_loss

WIDTH = 24
# Two of one rank are a stack; so is the third by itself.
ALIKE = {"a": (4, 8), "b": (4, 8), "c": (8, 16)}  # rank, alpha
UNLIKE = {"a": (4, 8), "b": (4, 2), "c": (8, 16)}  # no one factor for the first stack


def attached(candidates):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH, bias=False))
    made = attach_candidates(
        model,
        {
            name: LoraOptions(rank=rank, alpha=alpha, seed=seed, targets=r".*")
            for seed, (name, (rank, alpha)) in enumerate(candidates.items())
        },
    )
    for member in made.members.values():
        for layer in member.values():
            nn.init.normal_(layer.lora_B, std=0.3)
    made.set_present(list(candidates))
    return made


class Operations(TorchDispatchMode):
    """Counts what a GPU would have to be told, views left out; or one kind of that."""

    def __init__(self, kind=""):
        super().__init__()
        self.kind, self.seen = kind, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        counts = str(func.overloadpacket) == self.kind if self.kind else not func.is_view
        self.seen += counts
        return func(*args, **(kwargs or {}))


def step(made, *, rounded):
    """A pass in bfloat16: output, each candidate's gradients, and how often something is cast."""
    x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1))
    made.clear_gradients()
    matrices = RoundedMatrices(made.matrices() if rounded else (), torch.bfloat16)
    with matrices.provided(), Operations("aten._to_copy") as casts:
        with torch.autocast("cpu", torch.bfloat16):
            y = made.model(x)
        y.float().square().sum().backward()
    made.hand_out_gradients()
    gradients = {
        f"{name} {path} {kind}": getattr(layer, f"lora_{kind}").grad
        for name, member in made.members.items()
        for path, layer in member.items()
        for kind in "AB"
    }
    return y.detach(), gradients, casts.seen


@pytest.mark.parametrize("candidates", [ALIKE, UNLIKE])
def test_bit_for_bit_where_the_scaling_is_a_power_of_two(candidates):
    made = attached(candidates)
    expected, gradients, _ = step(made, rounded=False)
    got, others, _ = step(made, rounded=True)
    assert torch.equal(got, expected)
    assert len(gradients) == 3 * 2 * 2
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        assert torch.equal(others[name], gradient), name
    # The control: other matrices, other gradients.
    with torch.no_grad():
        made.members["b"]["0"].lora_B.mul_(1.1)
    changed = step(made, rounded=True)[1]
    assert not torch.equal(changed["b 2 A"], others["b 2 A"])
    assert torch.equal(changed["a 2 A"], others["a 2 A"])


@pytest.mark.parametrize(("candidates", "stacks"), [(ALIKE, 2), (UNLIKE, 1)])
def test_nothing_of_a_stack_is_cast_in_a_layer(candidates, stacks):
    made = attached(candidates)
    each = step(made, rounded=False)[2]
    once = step(made, rounded=True)[2]
    # A and B in both passes, and their gradients; but the first layer's input needs no gradient.
    assert each - once == (6 + 5) * stacks
    assert all(stack.rounded is None for layer in made.layers for stack in layer.stacks)


def test_a_step_of_eight_is_told_in_a_third_of_the_operations_of_eight_alone(make_llama, rows):
    """In bfloat16, as on a GPU."""
    trials = [
        Trial(f"{rank} {rate}", LoraOptions(rank=rank), rate)
        for rank in (2, 3, 4, 8)
        for rate in (1e-3, 3e-3)
    ]
    batch = collate(rows[:3], 0)

    def operations(train_all):
        """Of one step: what three steps take more than two."""
        counts = []
        for steps in (2, 3):
            options = LoopOptions(steps=steps, device="cpu", dtype="bfloat16")
            with Operations() as operations:
                train_all([batch] * 3, options)
            counts.append(operations.seen)
        return counts[1] - counts[0]

    def company(batches, options):
        train_together(
            make_llama().bfloat16(), trials, batches, grouped_language_model_loss, options
        )

    def alone(batches, options):
        for trial in trials:
            model = make_llama().bfloat16()
            attach(model, trial.lora)
            train(model, batches, language_model_loss, options)

    assert 0 < operations(company) < operations(alone) / 3
