"""Matrices rounded for all layers at once give what each layer gives by itself."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from loraport.training import LoraOptions, attach
from loraport.training.lora.inject import lora_layers
from loraport.training.lora.rounded import RoundedMatrices

RANK, WIDTH = 4, 24


class Model(nn.Module):
    """Linear layers, one of transformers' transposed ones, and one that takes no part."""

    def __init__(self, layers=2):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(layers))
        self.turned = Conv1D(WIDTH, WIDTH)
        self.unused = nn.Linear(WIDTH, WIDTH)
        self.again = False

    def forward(self, x):
        for layer in [*self.layers, self.turned]:
            x = checkpoint(layer, x, use_reentrant=False) if self.again else layer(x)
            x = torch.tanh(x)
        return x


def model(alpha, layers=2, **options):
    torch.manual_seed(0)
    made = Model(layers)
    attach(made, LoraOptions(rank=RANK, alpha=alpha, targets=r".*", **options))
    for layer in lora_layers(made).values():
        nn.init.normal_(layer.lora_B, std=0.3)
    return made


def step(made, *, rounded, dtype=torch.bfloat16):
    """One forward and backward pass in bfloat16; the output and every gradient by name."""
    x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1))
    layers = lora_layers(made).values() if rounded else ()
    with RoundedMatrices(layers, dtype).provided():
        with torch.autocast("cpu", torch.bfloat16):
            y = made(x)
        y.float().square().sum().backward()
    gradients = {name: p.grad for name, p in made.named_parameters() if p.requires_grad}
    return y.detach(), gradients


@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("options", [{}, {"use_dora": True}])
def test_bit_for_bit_where_the_scaling_is_a_power_of_two(options, again):
    made = model(2 * RANK, **options)
    made.again = again
    expected, gradients = step(copy.deepcopy(made), rounded=False)
    got, others = step(made, rounded=True)
    assert torch.equal(got, expected)
    assert gradients.keys() == others.keys()
    for name, gradient in gradients.items():
        if gradient is None:
            assert others[name] is None
            assert name.startswith("unused.")
        else:
            assert others[name].dtype == gradient.dtype == torch.float32
            assert torch.equal(others[name], gradient), name
    assert sum(gradient is None for gradient in gradients.values()) == (3 if options else 2)


def test_near_float64_with_another_scaling():
    made = model(7)
    reference = copy.deepcopy(made).double()
    x = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    reference(x).square().sum().backward()
    gradients = {n: p.grad for n, p in reference.named_parameters() if p.grad is not None}
    _, got = step(made, rounded=True)
    for name, expected in gradients.items():
        error = (got[name].double() - expected).norm() / expected.norm()
        assert 0 < error < 2e-2, name  # 8-bit mantissas
    # The control: with another scaling the gradients are others.
    _, other = step(model(14), rounded=True)
    name = next(iter(gradients))
    assert (other[name] - got[name]).norm() / got[name].norm() > 0.1


def test_several_parts_of_a_step_add_up_and_the_next_step_sees_what_the_optimizer_did():
    made = model(2 * RANK)
    layers = lora_layers(made)
    rounded = RoundedMatrices(layers.values(), torch.bfloat16)
    once = {}
    for _ in range(2):
        with rounded.provided(), torch.autocast("cpu", torch.bfloat16):
            made(torch.ones(3, WIDTH)).float().sum().backward()
        gradients = {n: p.grad.clone() for n, p in made.named_parameters() if p.grad is not None}
        once = once or gradients
    for name, gradient in gradients.items():
        assert torch.equal(gradient, 2 * once[name]), name
        assert gradient.abs().max() > 0
    made.zero_grad()
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.zero_()
    with rounded.provided(), torch.autocast("cpu", torch.bfloat16):
        made(torch.ones(3, WIDTH)).float().sum().backward()
    changed = [made.get_parameter(name).grad for name in once if name.endswith("lora_A")]
    assert len(changed) == 3
    assert not any(gradient.any() for gradient in changed)  # A gets its gradient through B


@pytest.mark.parametrize("change", [{"dropout": 0.5}, {"init": "pissa"}])
def test_layers_whose_matrices_are_not_simply_multiplied_keep_their_own_way(change):
    made = model(2 * RANK, **change)
    with RoundedMatrices(lora_layers(made).values(), torch.bfloat16).provided():
        assert all(layer.rounded is None for layer in lora_layers(made).values())


def test_float32_products_need_no_rounding_and_nothing_stays_after_an_error():
    made = model(2 * RANK)
    layers = lora_layers(made).values()
    with RoundedMatrices(layers, torch.float32).provided():
        assert all(layer.rounded is None for layer in layers)

    def fails():
        with RoundedMatrices(layers, torch.bfloat16).provided():
            assert all(layer.rounded is not None for layer in layers)
            raise RuntimeError("meant")

    with pytest.raises(RuntimeError, match="meant"):
        fails()
    assert all(layer.rounded is None for layer in layers)


class Casts(TorchDispatchMode):
    """Counts the tensors that are made from others in another dtype, one operation each."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._to_copy.default
        return function(*args, **(kwargs or {}))


def casts(layers, *, rounded):
    made = model(2 * RANK, layers)
    made.to(torch.bfloat16)
    for layer in lora_layers(made).values():
        layer.lora_A.data, layer.lora_B.data = layer.lora_A.float(), layer.lora_B.float()
    with Casts() as counted:
        step(made, rounded=rounded)
    return counted.count


def test_more_layers_need_no_more_casts():
    assert casts(6, rounded=True) == casts(2, rounded=True)
    assert casts(6, rounded=False) >= casts(2, rounded=False) + 4 * 4
