"""The fused LoRA product against torch's own operations, in float64 and in what it keeps."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loraport.training import LoraOptions, attach
from loraport.training.lora.lora_function import add_low_rank, lora_linear
from loraport.training.lora.rounded import RoundedMatrices

# float64: only the order of sums differs.
TOLERANCE = {"rtol": 1e-12, "atol": 1e-12}


def parts(shape=(2, 3, 5), out=7, rank=4, dtype=torch.float64):
    torch.manual_seed(0)
    x = torch.randn(*shape, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(out, shape[-1], dtype=dtype), torch.randn(out, dtype=dtype)
    a = torch.randn(rank, shape[-1], dtype=dtype, requires_grad=True)
    b = torch.randn(out, rank, dtype=dtype, requires_grad=True)
    return x, weight, bias, a, b


def plain(x, weight, bias, a, b, scaling):
    return F.linear(x, weight, bias) + scaling * F.linear(F.linear(x, a), b)


def test_gradcheck():
    x, weight, bias, a, b = parts()
    assert torch.autograd.gradcheck(
        lambda x, a, b: lora_linear(x, weight, bias, a, b, 1.5), (x, a, b)
    )
    base = torch.randn(2, 3, 7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda base, x, a, b: add_low_rank(base, x, a, b, 1.5), (base, x, a, b)
    )


@pytest.mark.parametrize("shape", [(5,), (6, 5), (2, 3, 5)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_equals_plain_operations(shape, with_bias):
    x, weight, bias, a, b = parts(shape)
    bias = bias if with_bias else None
    results = []
    for function in (lora_linear, plain):
        y = function(x, weight, bias, a, b, -0.75)
        gradients = torch.autograd.grad(y.sin().sum(), (x, a, b))
        results.append((y, *gradients))
    for mine, other in zip(*results, strict=True):
        torch.testing.assert_close(mine, other, **TOLERANCE)
    with torch.no_grad():
        torch.testing.assert_close(
            lora_linear(x, weight, bias, a, b, -0.75), results[1][0], **TOLERANCE
        )
        # Control: without the update the output is another.
        assert not torch.allclose(F.linear(x, weight, bias), results[1][0])


def test_an_input_without_gradient_gets_none_and_a_transposed_weight_does():
    x, weight, bias, a, b = parts()
    stored = weight.T.contiguous()  # as transformers' Conv1D keeps it
    y = lora_linear(x.detach(), stored.T, bias, a, b, 2.0)
    y.sum().backward()
    expected = torch.autograd.grad(plain(x, weight, bias, a, b, 2.0).sum(), (a, b))
    torch.testing.assert_close(a.grad, expected[0], **TOLERANCE)
    torch.testing.assert_close(b.grad, expected[1], **TOLERANCE)
    assert weight.grad is None


@pytest.mark.parametrize("function", [lora_linear, add_low_rank])
def test_a_model_may_change_the_output_in_place(function):
    x, weight, bias, a, b = parts()
    base = F.linear(x, weight, bias)
    arguments = (x, weight, bias) if function is lora_linear else (base, x)
    y = function(*arguments, a, b, 1.5)
    y *= 2
    y.sin().sum().backward()
    other = parts()
    beside = 2 * plain(*other, 1.5)
    beside.sin().sum().backward()
    for mine, expected in ((x, other[0]), (a, other[3]), (b, other[4])):
        torch.testing.assert_close(mine.grad, expected.grad, **TOLERANCE)


def kept_bytes(function, *leave_out):
    """Bytes that autograd keeps for the backward pass, each storage counted once."""
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = function()
    for tensor in leave_out:
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    return sum(kept.values()), y


@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_only_the_input_and_the_narrow_product_are_kept(base_dtype):
    layer = nn.Linear(64, 96).to(base_dtype)
    model = nn.Sequential(layer)
    lora = attach(model, LoraOptions(rank=4))["0"]
    x = torch.randn(50, 64, dtype=base_dtype, requires_grad=True)
    constant = [layer.weight, layer.bias, lora.lora_A, lora.lora_B]
    size = x.element_size()
    with RoundedMatrices([lora], base_dtype).provided():
        kept, _ = kept_bytes(lambda: model(x), *constant, *(lora.rounded or ()))
    assert kept == 50 * 64 * size + 50 * 4 * size
    # Control: what torch keeps of the same sum when the update is computed in float32.
    x32 = x.float()
    plainly, _ = kept_bytes(
        lambda: model[0].base_layer(x) + F.linear(F.linear(x32, lora.lora_A), lora.lora_B) * 2,
        *constant,
    )
    assert plainly > kept if base_dtype is torch.bfloat16 else plainly == kept


def test_bfloat16_products_give_float32_gradients_near_the_exact_ones():
    x, weight, bias, a, b = parts((40, 64), 96, 8, torch.float32)
    exact = torch.autograd.grad(
        plain(*(t.double() for t in (x, weight, bias, a, b)), 1.5).square().mean(), (x, a, b)
    )
    half = (x.detach().bfloat16().requires_grad_(), weight.bfloat16(), bias.bfloat16(), a, b)
    y = lora_linear(*half, 1.5)
    assert y.dtype is torch.bfloat16
    got = torch.autograd.grad(y.float().square().mean(), (half[0], a, b))
    assert [g.dtype for g in got] == [torch.bfloat16, torch.float32, torch.float32]
    for mine, other in zip(got, exact, strict=True):
        # bfloat16 keeps 8 bits; some ten roundings, which average out over the sums.
        assert (mine.double() - other).norm() < 0.02 * other.norm()


def test_autocast_chooses_the_dtype_of_the_products():
    x, weight, bias, a, b = parts((6, 5), dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lora_linear(x, weight, bias, a, b, 1.5)
        theirs = F.linear(x, weight, bias)
    assert y.dtype is theirs.dtype is torch.bfloat16
    gradients = torch.autograd.grad(y.float().sum(), (x, a, b))
    assert {g.dtype for g in gradients} == {torch.float32}
    exact = plain(x, weight, bias, a, b, 1.5)
    torch.testing.assert_close(y.float(), exact, rtol=0.05, atol=0.1)


def test_autocast_changes_nothing_where_the_base_says_the_dtype():
    """A float64 weight, and the output of a base that is not ours."""
    x, weight, bias, a, b = parts()
    single = [tensor.detach().float() for tensor in (F.linear(x, weight, bias), x, a, b)]
    calls = (lambda: lora_linear(x, weight, bias, a, b, 1.5), lambda: add_low_rank(*single, 1.5))
    for call in calls:
        expected = call()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            got = call()
        assert got.dtype is expected.dtype
        assert torch.equal(got, expected)
    # The control: in bfloat16 the numbers are others.
    assert not torch.equal(add_low_rank(*(t.bfloat16() for t in single), 1.5).float(), expected)


@pytest.mark.parametrize("watched", [False, True])
def test_a_gain_and_a_bias_in_float32_leave_the_dtype_of_the_base(watched):
    torch.manual_seed(0)
    exact = nn.Linear(5, 7)
    layer = attach(nn.Sequential(exact.bfloat16()), LoraOptions(rank=2))["0"]
    layer.gain, layer.extra_bias = torch.full((7,), 1.5), torch.arange(7.0)
    if watched:
        layer.base_layer.register_forward_hook(lambda *_: None)
    x = torch.randn(3, 5).bfloat16()
    y = layer(x)
    assert y.dtype is torch.bfloat16
    weight, bias = exact.weight.float(), exact.bias.float()
    expected = 1.5 * (x.float() @ weight.T) + bias + torch.arange(7.0)  # B is zero
    torch.testing.assert_close(y.float(), expected, rtol=2e-2, atol=2e-2)  # 8 bits of mantissa
    assert (F.linear(x, exact.weight, exact.bias).float() - expected).abs().max() > 1  # control


def test_a_hook_on_the_base_still_sees_it_called():
    model = nn.Sequential(nn.Linear(5, 7))
    layer = attach(model, LoraOptions(rank=2))["0"]
    nn.init.normal_(layer.lora_B)
    x = torch.randn(3, 5)
    expected, seen = model(x), []
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    torch.testing.assert_close(model(x), expected)
    assert seen == [1]


@pytest.mark.parametrize("function", [lora_linear, add_low_rank])
def test_gradients_lie_as_a_and_b_do(function):
    """Autograd copies others, one operation for each layer."""
    x, weight, bias, a, b = parts()
    arguments = (x, weight, bias) if function is lora_linear else (F.linear(x, weight), x)
    found = torch.autograd.grad(function(*arguments, a, b, 1.5).sum(), (a, b))
    assert [gradient.stride() for gradient in found] == [a.stride(), b.stride()]
    assert found[1].T.stride() != b.stride()  # the control
