"""Each LoRA layer against PEFT's with the same matrices: outputs and gradients."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loraport.errors import LoraportError
from loraport.training import LoraOptions, adapter_of, attach
from loraport.training.lora.layers import lora_layer_for
from loraport.variants import lower

# PEFT asks transformers in a way that is going out of use.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

# float64 throughout: only rounding differs, at about 1e-15 of values of about 1.
TOLERANCE = {"rtol": 1e-11, "atol": 1e-12}


class One(nn.Module):
    """A model of one layer, which has a path then."""

    def __init__(self, layer):
        super().__init__()
        self.fc = layer

    def forward(self, x):
        return self.fc(x)


def tokens():
    return torch.tensor([[1, 4, 4], [0, 2, 6]])


LAYERS = {
    "linear": (lambda: nn.Linear(5, 7), lambda: torch.randn(2, 3, 5)),
    "linear without bias": (lambda: nn.Linear(9, 4, bias=False), lambda: torch.randn(6, 9)),
    "transformers Conv1D": (lambda: Conv1D(7, 5), lambda: torch.randn(2, 3, 5)),
    "embedding": (lambda: nn.Embedding(8, 5), tokens),
    "embedding with padding": (lambda: nn.Embedding(8, 5, padding_idx=4), tokens),
    "conv1d": (lambda: nn.Conv1d(3, 5, 4, stride=2, padding=1), lambda: torch.randn(2, 3, 9)),
    "conv2d": (
        lambda: nn.Conv2d(3, 5, (2, 3), stride=(2, 1), padding=(1, 0)),
        lambda: torch.randn(2, 3, 6, 7),
    ),
    "conv3d": (
        lambda: nn.Conv3d(3, 5, (2, 3, 1), stride=(2, 1, 1), padding=(1, 0, 1)),
        lambda: torch.randn(2, 3, 6, 7, 4),
    ),
}


def both(make, *, rank=4, alpha=6.0, use_rslora=False):
    """The same layer adapted by loraport and by PEFT, with the same random A and B."""
    torch.manual_seed(0)
    base = make().double()
    ours = One(copy.deepcopy(base))
    options = LoraOptions(rank=rank, alpha=alpha, use_rslora=use_rslora, targets=("fc",))
    layer = attach(ours, options)["fc"]
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=use_rslora,
        target_modules=["fc"],
        fan_in_fan_out=isinstance(base, Conv1D),
    )
    theirs = peft.get_peft_model(One(copy.deepcopy(base)), config)
    inner = theirs.base_model.model.fc
    if isinstance(base, nn.Embedding):
        peft_a, peft_b = inner.lora_embedding_A["default"], inner.lora_embedding_B["default"]
    else:
        peft_a, peft_b = inner.lora_A["default"].weight, inner.lora_B["default"].weight
    theirs.double()
    with torch.no_grad():
        for mine, other in ((layer.lora_A, peft_a), (layer.lora_B, peft_b)):
            mine.copy_(torch.randn(mine.shape))
            other.copy_(mine)
    return ours, layer, theirs, (peft_a, peft_b)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_equals_peft(name, use_rslora):
    make, make_input = LAYERS[name]
    ours, layer, theirs, (peft_a, peft_b) = both(make, use_rslora=use_rslora)
    x = make_input()
    x = x.double() if x.is_floating_point() else x
    mine, other = ours(x), theirs(x)
    torch.testing.assert_close(mine, other, **TOLERANCE)
    assert not torch.allclose(mine, layer.base_layer(x))
    weights = torch.randn(mine.shape, dtype=torch.float64)
    (mine * weights).sum().backward()
    (other * weights).sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, peft_a.grad, **TOLERANCE)
    torch.testing.assert_close(layer.lora_B.grad, peft_b.grad, **TOLERANCE)
    assert layer.lora_A.grad.abs().max() > 0
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("name", LAYERS)
def test_equals_the_merged_weight(name):
    """The adapter's canonical form, merged into the weight, computes the same."""
    make, make_input = LAYERS[name]
    ours, layer, _, _ = both(make)
    x = make_input()
    x = x.double() if x.is_floating_point() else x
    delta = lower(adapter_of(ours).modules["fc"]).delta(torch.float64)
    merged = copy.deepcopy(layer.base_layer)
    transposed = layer.fan_in_fan_out or isinstance(merged, nn.Embedding)
    with torch.no_grad():
        merged.weight += (delta.T if transposed else delta).reshape(merged.weight.shape)
    torch.testing.assert_close(ours(x), merged(x), **TOLERANCE)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv1d(3, 4, 3, dilation=2),
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.Conv3d(3, 4, 3, padding=1, padding_mode="replicate", dilation=(1, 2, 1)),
    ],
)
def test_convolutions_that_peft_cannot_do_equal_the_merged_weight(layer):
    torch.manual_seed(0)
    model = One(layer.double())
    lora = attach(model, LoraOptions(rank=2, targets=("fc",)))["fc"]
    nn.init.normal_(lora.lora_B)
    x = torch.randn(2, 3, *(7,) * (layer.weight.dim() - 2), dtype=torch.float64)
    merged = copy.deepcopy(layer)
    delta = lower(adapter_of(model).modules["fc"]).delta(torch.float64)
    with torch.no_grad():
        merged.weight += delta.reshape(merged.weight.shape)
    torch.testing.assert_close(model(x), merged(x), **TOLERANCE)


def test_matrices_stay_float32_beside_a_bfloat16_base():
    model = One(nn.Linear(5, 7).bfloat16())
    layer = attach(model, LoraOptions(rank=2))["fc"]
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 5).bfloat16()
    y = model(x)
    assert y.dtype is torch.bfloat16
    assert layer.lora_A.dtype is layer.lora_B.dtype is torch.float32
    exact = layer.base_layer.double()(x.double()) + layer.scaling * (
        x.double() @ layer.lora_A.double().T @ layer.lora_B.double().T
    )
    # bfloat16 keeps 8 bits; two roundings.
    torch.testing.assert_close(y.double(), exact, rtol=2**-7, atol=2**-6)


@pytest.mark.parametrize("init", ["kaiming", "gaussian"])
def test_starts_at_the_base(init):
    model = One(nn.Linear(64, 48))
    x = torch.randn(3, 64)
    expected = model(x)
    layer = attach(model, LoraOptions(rank=32, init=init, seed=1))["fc"]
    assert torch.equal(model(x), expected)
    deviation = {"kaiming": 1 / (64**0.5 * 3**0.5), "gaussian": 1 / 32}[init]
    assert layer.lora_A.std().item() == pytest.approx(deviation, rel=0.1)
    assert layer.lora_A.abs().max() < (1 / 8 if init == "kaiming" else 1)
    other = attach(One(nn.Linear(64, 48)), LoraOptions(rank=32, init=init, seed=2))["fc"]
    assert not torch.equal(other.lora_A, layer.lora_A)


def test_dropout_only_while_training():
    model = One(nn.Linear(50, 7))
    layer = attach(model, LoraOptions(rank=4, dropout=0.5))["fc"]
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 50)
    assert not torch.equal(model.train()(x), model(x))
    assert torch.equal(model.eval()(x), model(x))


def test_grouped_convolutions_load_with_a_fitting_rank_only():
    layer = nn.Conv1d(4, 6, 3, groups=2)
    lora_class = lora_layer_for(layer)
    assert lora_class(layer, 4, 4.0).lora_B.shape == (6, 2, 1)
    with pytest.raises(LoraportError, match="multiple of them, got 3"):
        lora_class(layer, 3, 4.0)
