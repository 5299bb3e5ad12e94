"""Head and cross entropy by chunks against the plain loss over all logits."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loraport.training import LoraOptions, attach
from loraport.training.data.batches import IGNORED, TokenBatch
from loraport.training.losses.chunked_loss import (
    LogitTransform,
    linear_cross_entropy,
    module_cross_entropy,
)
from loraport.training.losses.language_model import language_model_loss
from loraport.training.losses.output_head import logit_transform

TRANSFORMS = [
    LogitTransform(),
    LogitTransform(0.25),
    LogitTransform(1.0, 3.0),
    LogitTransform(2, 5),
]


def parts(dtype=torch.float64, n=11, dim=6, vocabulary=17):
    torch.manual_seed(0)
    hidden = torch.randn(n, dim, dtype=dtype, requires_grad=True)
    weight, bias = torch.randn(vocabulary, dim, dtype=dtype), torch.randn(vocabulary, dtype=dtype)
    return hidden, weight, bias, torch.randint(vocabulary, (n,))


@pytest.mark.parametrize("chunk", [1, 4, 11, 50, None])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_equals_the_plain_loss(transform, chunk):
    hidden, weight, bias, targets = parts()
    logits = transform(F.linear(hidden, weight, bias))
    plain = F.cross_entropy(logits, targets, reduction="sum")
    (expected,) = torch.autograd.grad(2.5 * plain, hidden)
    for total in (
        linear_cross_entropy(hidden, weight, bias, targets, transform, chunk),
        module_cross_entropy(
            hidden, lambda x: F.linear(x, weight, bias), len(weight), targets, transform, chunk
        ),
    ):
        torch.testing.assert_close(total, plain, rtol=1e-12, atol=0)
        (gradient,) = torch.autograd.grad(2.5 * total, hidden)
        torch.testing.assert_close(gradient, expected, rtol=1e-11, atol=1e-12)
    if transform != LogitTransform():
        # Control: without the transform it is another loss.
        other = linear_cross_entropy(hidden, weight, bias, targets, None, chunk)
        assert abs(other - plain) > 0.01


def test_gradcheck_and_no_gradient_where_none_is_wanted():
    hidden, weight, bias, targets = parts()
    assert torch.autograd.gradcheck(
        lambda h: linear_cross_entropy(h, weight, bias, targets, LogitTransform(2, 5), 4), hidden
    )
    with torch.no_grad():
        assert not linear_cross_entropy(hidden, weight, None, targets).requires_grad
    nothing = linear_cross_entropy(hidden[:0], weight, None, targets[:0])
    assert nothing.item() == 0


def test_a_bfloat16_head_sums_in_float32():
    hidden, weight, bias, targets = parts(torch.float32, n=64, dim=32)
    exact = F.cross_entropy(F.linear(hidden, weight, bias).double(), targets, reduction="sum")
    total = linear_cross_entropy(
        hidden.bfloat16(), weight.bfloat16(), bias.bfloat16(), targets, chunk=16
    )
    assert total.dtype is torch.float32
    # bfloat16 keeps 8 bits of inputs and logits of about 6.
    assert abs(total.item() - exact.item()) < 0.01 * exact.item()


def largest_tensor(function):
    """Numbers in the largest tensor that any operation makes, forward and backward."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves

    class Watch(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
            output = operation(*args, **(kwargs or {}))
            sizes = [t.numel() for t in tree_leaves(output) if isinstance(t, torch.Tensor)]
            Watch.largest = max([Watch.largest, *sizes])
            return output

    with Watch():
        function().backward()
    return Watch.largest


def test_no_tensor_of_all_logits_is_ever_made():
    hidden, weight, _, targets = parts(torch.float32, n=100, dim=4, vocabulary=500)
    by_chunks = largest_tensor(lambda: linear_cross_entropy(hidden, weight, None, targets, chunk=8))
    assert by_chunks == 8 * 500
    # Control: the plain loss does.
    plain = largest_tensor(lambda: F.cross_entropy(hidden @ weight.T, targets))
    assert plain == 100 * 500


def tiny(kind):
    """Models that do something to their logits, with the transform expected."""
    import transformers as t

    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    torch.manual_seed(0)
    if kind == "llama":
        return t.LlamaForCausalLM(t.LlamaConfig(**sizes)), LogitTransform()
    if kind == "gemma2":
        config = t.Gemma2Config(**sizes, final_logit_softcapping=0.7)
        return t.Gemma2ForCausalLM(config), LogitTransform(1.0, 0.7)
    sizes.pop("head_dim")
    if kind == "cohere":
        return t.CohereForCausalLM(t.CohereConfig(**sizes, logit_scale=3.5)), LogitTransform(3.5)
    config = t.GraniteConfig(**sizes, logits_scaling=0.2)
    return t.GraniteForCausalLM(config), LogitTransform(5.0)


def batch_of(vocabulary, rows=3, length=9):
    torch.manual_seed(1)
    tokens = torch.randint(3, vocabulary, (rows, length))
    labels = tokens.clone()
    labels[:, :4] = IGNORED
    labels[1, 7:] = IGNORED
    return TokenBatch(tokens, None, labels)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "cohere", "granite"])
def test_what_models_do_to_their_logits_is_found_and_done(kind):
    model, expected = tiny(kind)
    model = model.double().eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    assert logit_transform(model, model.get_output_embeddings()) == expected
    for layer in attach(model, LoraOptions(rank=2)).values():
        nn.init.normal_(layer.lora_B)
    batch = batch_of(64)
    ours = language_model_loss(model, batch)
    theirs = F.cross_entropy(
        model(input_ids=batch.tokens).logits[:, :-1].flatten(0, 1),
        batch.labels[:, 1:].flatten(),
        reduction="sum",
    )
    # Models compute parts (norms, rotary angles) in float32 whatever their dtype; ours is one
    # forward pass of the same model, so these parts are the same.
    torch.testing.assert_close(ours.total, theirs, rtol=1e-9, atol=0)
    parameters = [p for p in model.parameters() if p.requires_grad]
    pairs = zip(
        torch.autograd.grad(ours.total, parameters),
        torch.autograd.grad(theirs, parameters),
        strict=True,
    )
    for mine, other in pairs:
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-9)


class Odd(nn.Module):
    """A model whose logits are no function of this kind."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def get_output_embeddings(self):
        return self.model.get_output_embeddings()

    def forward(self, **inputs):
        output = self.model(**inputs)
        output.logits = output.logits.abs() + 0.1
        return output


def test_an_unknown_transform_falls_back_to_the_models_own_logits():
    model = Odd(tiny("llama")[0].double().eval())
    assert logit_transform(model, model.get_output_embeddings()) is None
    batch = batch_of(64)
    expected = F.cross_entropy(
        model(input_ids=batch.tokens).logits[:, :-1].flatten(0, 1),
        batch.labels[:, 1:].flatten(),
        reduction="sum",
    )
    # The fallback sums in float32.
    got = language_model_loss(model, batch).total
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=0)


def test_lora_on_the_head_learns_the_same():
    model = tiny("gemma2")[0].double().eval()
    other = copy.deepcopy(model)
    batch = batch_of(64)
    gradients = []
    for each, chunked in ((model, True), (other, False)):
        layers = attach(each, LoraOptions(rank=2, targets=("lm_head", "v_proj")))
        for layer in layers.values():
            torch.manual_seed(2)
            nn.init.normal_(layer.lora_B)
        if chunked:
            total = language_model_loss(each, batch).total
        else:
            total = F.cross_entropy(
                each(input_ids=batch.tokens).logits[:, :-1].flatten(0, 1),
                batch.labels[:, 1:].flatten(),
                reduction="sum",
            )
        total.backward()
        gradients.append([total, *(x.lora_A.grad for x in layers.values())])
        gradients[-1] += [x.lora_B.grad for x in layers.values()]
    for mine, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-9)
        assert expected.abs().max() > 0


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_single_losses_and_their_own_gradients(reduction):
    """Each token's loss has a gradient of its own, against torch's logits in full."""
    torch.manual_seed(0)
    weight, targets = torch.randn(50, 12).double(), torch.randint(50, (9,))
    factor = torch.linspace(-1, 2, 9).double() if reduction == "none" else torch.tensor(0.7)
    results = []
    for kind in ("linear", "module", "torch"):
        hidden = torch.linspace(-1, 1, 9 * 12).double().view(9, 12).requires_grad_(True)
        if kind == "linear":
            got = linear_cross_entropy(hidden, weight, None, targets, chunk=4, reduction=reduction)
        elif kind == "module":
            head = lambda part: part @ weight.T  # noqa: E731
            got = module_cross_entropy(hidden, head, 50, targets, chunk=4, reduction=reduction)
        else:
            got = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction=reduction)
        (got * factor).sum().backward()
        results.append((got.detach(), hidden.grad))
    for got, gradient in results[:2]:
        torch.testing.assert_close(got, results[2][0], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, results[2][1], rtol=1e-10, atol=1e-12)
