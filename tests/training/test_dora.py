"""DoRA: training equals PEFT's step by step, and what is saved is what PEFT computes with."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loraport.errors import LoraportError
from loraport.peft_layout.write import write_peft
from loraport.training import LoopOptions, LoraOptions, adapter_of, attach, load_into, train

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

STEPS, RATE = 4, 0.02
PROJECTIONS = ["q_proj", "k_proj", "o_proj", "up_proj", "down_proj"]
OPTIONS = LoraOptions(rank=3, alpha=5, use_dora=True, targets=tuple(PROJECTIONS), init="gaussian")


def batches():
    numbers = torch.Generator().manual_seed(4)
    return [torch.randint(0, 256, (3, 11), generator=numbers) for _ in range(STEPS)]


def lm_loss(model, tokens):
    logits = model(input_ids=tokens).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def trained(model, options, steps=STEPS, **more):
    """Train with AdamW at a constant rate, without clipping: easily written down again."""
    layers = attach(model, options)
    loop = LoopOptions(
        learning_rate=RATE, steps=steps, warmup=0.0, clip=0, device="cpu", dtype="float32"
    )
    # The schedule decays the rate: PEFT's loop below gets the same rates.
    result = train(model, batches()[:steps], lm_loss, loop, **more)
    return layers, result


def peft_trained(base, layers_before, *, use_dora, steps=STEPS):
    """The same with PEFT, from the same matrices."""
    from peft import LoraConfig, get_peft_model

    from loraport.training.run.schedule import learning_rate

    config = LoraConfig(r=3, lora_alpha=5, use_dora=use_dora, target_modules=PROJECTIONS)
    model = get_peft_model(base, config, autocast_adapter_dtype=False)
    with torch.no_grad():
        for path, (a, b) in layers_before.items():
            layer = model.base_model.model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    losses = []
    for step, tokens in enumerate(batches()[:steps], start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, RATE, 0.0)
        optimizer.zero_grad()
        loss = lm_loss(model, tokens)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def matrices(layers):
    return {
        path: (layer.lora_A.detach().clone(), layer.lora_B.detach().clone())
        for path, layer in layers.items()
    }


def test_training_equals_peft_step_by_step(llama):
    base = llama.double()
    again = copy.deepcopy(base)
    before = matrices(attach(copy.deepcopy(base), OPTIONS))
    peft, expected = peft_trained(copy.deepcopy(base), before, use_dora=True)
    layers, result = trained(base, OPTIONS)
    # Computed in float64 here and there; norms are float32 in transformers' Llama.
    assert [loss for _, loss in result.losses] == pytest.approx(expected, rel=1e-6)
    moved = 0.0
    for path, layer in layers.items():
        theirs = peft.base_model.model.get_submodule(path)
        for mine, other in (
            (layer.lora_A, theirs.lora_A["default"].weight),
            (layer.lora_B, theirs.lora_B["default"].weight),
            (layer.magnitude, theirs.lora_magnitude_vector["default"].weight),
        ):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
        moved = max(moved, float((layer.magnitude - layer.squares.sqrt()).detach().abs().max()))
    assert moved > 1e-2
    # Control: without magnitudes the losses are others.
    _, plain = peft_trained(again, before, use_dora=False)
    assert max(abs(a - b) for a, b in zip(plain, expected, strict=True)) > 1e-3


def test_what_is_saved_is_what_peft_and_load_compute(llama, tmp_path):
    from peft import PeftModel

    fresh = copy.deepcopy(llama)
    layers, _ = trained(llama, OPTIONS)
    tokens = batches()[0]
    with torch.no_grad():
        expected = llama.eval()(input_ids=tokens).logits
    adapter = adapter_of(llama, base_model="base")
    assert all(module.magnitude is not None for module in adapter.modules.values())
    assert len(layers) == len(adapter.modules)
    write_peft(adapter, tmp_path / "adapter")
    with torch.no_grad():
        base = fresh(input_ids=tokens).logits
        loaded = copy.deepcopy(fresh)
        load_into(loaded, adapter)
        torch.testing.assert_close(loaded(input_ids=tokens).logits, expected, rtol=0, atol=2e-5)
        peft = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
        torch.testing.assert_close(peft(input_ids=tokens).logits, expected, rtol=0, atol=2e-5)
    assert (base - expected).abs().max() > 1e-2


@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_peft_loads_the_magnitudes_of_a_convolution(kind, tmp_path):
    from peft import PeftModel

    torch.manual_seed(0)
    model = nn.Sequential(kind(3, 5, 2))
    fresh = copy.deepcopy(model)
    options = LoraOptions(rank=2, use_dora=True, targets=("0",))
    layer = attach(model, options)["0"]
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.magnitude *= torch.linspace(0.5, 2, 5)
    write_peft(adapter_of(model), tmp_path / "adapter")
    x = torch.randn(2, 3, *(4,) * (layer.lora_A.dim() - 2))
    base = fresh(x)
    peft = PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(peft(x), model(x), rtol=1e-5, atol=1e-5)
    assert (model(x) - base).abs().max() > 0.1


def cases():
    from transformers.pytorch_utils import Conv1D

    numbers = torch.Generator().manual_seed(1)

    def normal(*shape):
        return torch.randn(*shape, generator=numbers).double()

    square = Conv1D(8, 8)
    nn.init.normal_(square.weight)
    nn.init.normal_(square.bias)
    return {
        "linear with bias": (nn.Linear(7, 5), normal(2, 4, 7)),
        "square Conv1D": (square, normal(3, 8)),
        "embedding": (nn.Embedding(11, 6), torch.tensor([[0, 3, 3], [10, 1, 2]])),
        "conv": (nn.Conv2d(3, 4, (3, 2), padding=1), normal(2, 3, 6, 5)),
    }


@pytest.mark.parametrize("name", list(cases()))
def test_output_and_gradients_are_those_of_the_definition(name):
    base, x = cases()[name]
    model = nn.Sequential(base.double())
    layer = attach(model, LoraOptions(rank=2, alpha=3, use_dora=True, targets=("0",)))["0"]
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.magnitude.mul_(torch.linspace(0.5, 1.5, len(layer.magnitude)))
    weight = base.weight.detach()
    turned = name in ("square Conv1D", "embedding")
    flat = weight.T if turned else weight.flatten(1)

    def definition(a, b, m):
        low = layer.scaling * b.flatten(1) @ a.flatten(1)
        norms = (flat + low).norm(dim=1).detach()
        whole = m[:, None] * (flat + low) / norms[:, None]
        whole = (whole.T if turned else whole).reshape(weight.shape)
        if name == "embedding":
            return F.embedding(x, whole)
        if name == "conv":
            return F.conv2d(x, whole, base.bias, padding=1)
        return F.linear(x, whole.T if turned else whole, base.bias)

    parts = [p.detach().clone().requires_grad_() for p in layer.parameters(recurse=False)]
    expected = definition(*parts)
    got = model(x)
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(2)).double()
    wanted = torch.autograd.grad((expected * direction).sum(), parts)
    (got * direction).sum().backward()
    for parameter, gradient in zip(layer.parameters(recurse=False), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-8, atol=1e-8)
        assert gradient.abs().max() > 1e-3


def test_norms_of_a_bfloat16_base_are_exact_and_need_slices_only(monkeypatch):
    from loraport.training.lora import base_rows

    monkeypatch.setattr(base_rows, "_NUMBERS", 100)  # several slices
    model = nn.Sequential(nn.Linear(33, 17)).bfloat16()
    layer = attach(model, LoraOptions(rank=4, use_dora=True, targets=("0",)))["0"]
    torch.nn.init.normal_(layer.lora_B)
    whole = model[0].base_layer.weight.double() + layer.scaling * (
        layer.lora_B.double() @ layer.lora_A.double()
    )
    got = (layer.magnitude / layer.present_gain()).double()
    torch.testing.assert_close(got, whole.norm(dim=1), rtol=1e-6, atol=0)


@pytest.mark.parametrize("options", [{"use_dora": True}, {"init": "pissa"}, {"init": "olora"}])
def test_a_run_resumed_equals_one_never_stopped(llama, tmp_path, options):
    lora = LoraOptions(rank=3, targets=("q_proj", "up_proj"), **options)
    loop = LoopOptions(steps=4, learning_rate=RATE, save_every=2, keep=9, device="cpu")
    whole, resumed = copy.deepcopy(llama), llama
    attach(whole, lora)
    train(whole, batches(), lm_loss, loop, work=tmp_path / "whole")
    import shutil

    (tmp_path / "work").mkdir()
    for name in ("checkpoint-00000002", "metrics.jsonl"):
        source = tmp_path / "whole" / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / "work" / name)
    attach(resumed, lora)
    train(resumed, batches(), lm_loss, loop, work=tmp_path / "work", resume=True)
    mine, others = adapter_of(resumed), adapter_of(whole)
    for path, module in mine.modules.items():
        for name, tensor in module.tensors().items():
            assert torch.equal(tensor, others.modules[path].tensors()[name]), (path, name)
    # Another variant's checkpoint is refused.
    attach(again := copy.deepcopy(whole.__class__(whole.config)), LoraOptions(rank=3))
    with pytest.raises(LoraportError, match="cannot resume"):
        train(again, batches(), lm_loss, loop, work=tmp_path / "work", resume=True)
