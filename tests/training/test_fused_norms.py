"""RMS norms by one kernel: which, what they compute, and how much less a GPU is told.

PyTorch's function stands for the kernel; the GPU's own is in ``tests/cuda``.
"""

import copy

import peft
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from loraport.sweep.loss import grouped_language_model_loss
from loraport.sweep.together import train_together
from loraport.sweep.trial import Trial
from loraport.training import LoopOptions, LoraOptions, TrainOptions, attach, train
from loraport.training.data.batches import Row, collate
from loraport.training.devices import Placement
from loraport.training.kernels import fused_norms
from loraport.training.kernels.compiled import compiled_layers
from loraport.training.kernels.fused_norms import fused_norms as fused
from loraport.training.lora.inject import lora_layers
from loraport.training.lora.rounded import RoundedMatrices
from loraport.training.losses.language_model import language_model_loss
from loraport.training.memory.step_memory import step_memory

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.fixture(autouse=True)
def _here(monkeypatch):
    """Let a CPU have the kernel."""
    monkeypatch.setattr(fused_norms, "_DEVICES", ("cpu",))


def language_model(kind, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **more})
    model = transformers.AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def replaced(model):
    return [type(m).__name__ for m in model.modules() if "forward" in vars(m)]


@pytest.mark.parametrize(
    ("kind", "norms"),
    [
        ("Llama", ["LlamaRMSNorm"] * 5),
        ("Qwen3", ["Qwen3RMSNorm"] * 9),  # of queries and keys, too
        ("Olmo2", ["Olmo2RMSNorm"] * 9),
        ("Gemma", []),  # 1 + w
        ("Cohere", []),  # less the mean
        ("StableLm", []),  # LayerNorm
    ],
)
def test_norms_are_told_by_what_they_compute(kind, norms):
    model = language_model(kind)
    with fused(model, CPU):
        assert replaced(model) == norms
    assert not replaced(model)


class Norm(nn.Module):
    """An RMS norm, or something near."""

    def __init__(self, eps=1e-6, power=2):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(8))
        self.eps, self.power = eps, power

    def forward(self, x, gate=None):
        gated = x if gate is None else x * gate
        return self.weight * gated * (gated.abs().pow(self.power).mean(-1, True) + self.eps).rsqrt()


def outside(x, weight, eps):
    return weight * x / (x.square().mean(-1, keepdim=True).sqrt() + eps)


@pytest.mark.parametrize(
    ("module", "is_one"),
    [
        (Norm(), True),
        (Norm(eps=1e-3), True),
        (Norm(power=1), False),
        (Norm(eps=1), False),  # no float: something else by that name
        (nn.RMSNorm(8, eps=1e-5), True),
        (nn.RMSNorm((4, 8), eps=1e-5), False),
        (nn.LayerNorm(8), False),
        (nn.Linear(8, 8), False),
    ],
)
def test_modules_that_are_norms_and_others(module, is_one):
    with fused(model := nn.Sequential(module), CPU):
        assert bool(replaced(model)) is is_one


def test_what_is_added_to_the_root_is_another_formula(monkeypatch):
    monkeypatch.setattr(Norm, "forward", lambda self, x: outside(x, self.weight, self.eps))
    with fused(model := nn.Sequential(Norm(eps=1e-7)), CPU):  # seen in small numbers alone
        assert not replaced(model)


def test_without_a_kernel_models_keep_their_norms(monkeypatch):
    monkeypatch.undo()
    with fused(model := language_model("Llama"), CPU):
        assert not replaced(model)


def test_norms_that_someone_replaced_stay_so():
    model = language_model("Llama")
    mine = model.model.norm.forward = lambda x: x
    with fused(model, CPU):
        assert len(replaced(model)) == 5
        assert model.model.norm.forward is mine
    assert model.model.norm.forward is mine


def test_afterwards_the_model_is_as_it_was_even_if_something_fails():
    model = language_model("Llama")
    with pytest.raises(KeyError), fused(model, CPU):
        raise KeyError
    assert not replaced(model)


@pytest.fixture
def kernel(monkeypatch):
    """The kernel, and the dtypes it was given."""
    seen = []
    real = F.rms_norm

    def rms_norm(x, shape, weight, eps):
        assert not torch.is_autocast_enabled("cpu")
        seen.append((x.dtype, weight.dtype))
        return real(x, shape, weight, eps)

    monkeypatch.setattr(F, "rms_norm", rms_norm)
    return seen


def test_a_gate_or_another_dtype_is_left_to_the_module(kernel):
    module = Norm()
    x, gate = torch.randn(3, 8), torch.rand(3, 8)
    expected = [module(x, gate), module(x, gate=gate), module(x.double())]
    with fused(model := nn.Sequential(module), CPU):
        got = [model[0](x, gate), model[0](x, gate=gate), model[0](x.double())]
        assert not kernel
        model[0](x)
        assert len(kernel) == 1
    for mine, others in zip(got, expected, strict=True):
        assert torch.equal(mine, others)
        assert mine.dtype is others.dtype
    assert not torch.allclose(got[0], module(x))


def rows(count=4):
    numbers = torch.Generator().manual_seed(1)
    drawn = [torch.randint(1, 64, (5 + i,), generator=numbers).tolist() for i in range(count)]
    return [Row(tuple(tokens), tuple(tokens)) for tokens in drawn]


def loss_and_gradients(model, dtype=torch.float32):
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype is torch.bfloat16):
        part = language_model_loss(model, collate(rows(), 0))
    part.total.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return part.total.item(), found


def test_losses_and_gradients_are_those_of_the_models_own_norms(kernel):
    attach(model := language_model("Qwen3"), LoraOptions(rank=2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    expected, gradients = loss_and_gradients(model)
    with fused(model, CPU):
        got, others = loss_and_gradients(model)
    assert len(kernel) == 9
    assert got == pytest.approx(expected, rel=1e-6)
    assert len(gradients) == 2 * 2 * 7
    for name, gradient in gradients.items():
        torch.testing.assert_close(others[name], gradient, rtol=1e-4, atol=1e-5)
    model.model.norm.variance_epsilon = 0.5  # the control
    with fused(model, CPU):
        wrong, _ = loss_and_gradients(model)
    assert wrong != pytest.approx(expected, rel=1e-4)


def test_in_bfloat16_the_result_is_rounded_once(kernel):
    """Under autocast, too; the model's own norm rounds twice."""
    norm = language_model("Llama").model.norm.bfloat16()
    x = (3 * torch.randn(50, 32)).bfloat16()
    exact = F.rms_norm(x.double(), (32,), norm.weight.double(), norm.variance_epsilon)
    kernel.clear()
    with torch.autocast("cpu", torch.bfloat16), fused(nn.Sequential(norm), CPU):
        got = norm(x)
    assert kernel == [(torch.bfloat16, torch.bfloat16)]
    assert got.dtype is torch.bfloat16
    assert torch.equal(got, exact.bfloat16())
    assert not torch.equal(norm(x), got)


def test_runs_and_sweeps_use_them(kernel):
    batch, options = collate(rows(), 0), LoopOptions(steps=2, device="cpu")
    lora = LoraOptions(rank=2)
    attach(model := language_model("Llama"), lora)
    fast = train(model, [batch] * 2, language_model_loss, options).losses
    assert len(kernel) >= 2 * 5
    kernel.clear()
    trials = [Trial(name, lora, options.learning_rate) for name in "ab"]
    together = train_together(
        language_model("Llama"), trials, [batch] * 2, grouped_language_model_loss, options
    )
    assert len(kernel) >= 2 * 5
    for outcome in together.values():
        assert [loss for _, loss in outcome.losses] == pytest.approx(
            [loss for _, loss in fast], rel=1e-5
        )


def test_a_dry_run_counts_them(kernel):
    with torch.device("meta"):
        model = language_model("Llama")
    options = TrainOptions(lora=LoraOptions(rank=2), batch_size=1, max_length=8)
    step_memory(model, options, Placement(CPU, torch.float32))
    assert len(kernel) == 5


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
def test_compiled_layers_keep_their_own(kernel):
    attach(model := language_model("Llama"), LoraOptions(rank=2))
    expected, _ = loss_and_gradients(copy.deepcopy(model))
    with compiled_layers(model, "eager"), fused(model, CPU):
        assert replaced(model) == ["LlamaRMSNorm"]  # the last, which is in no layer
        got, _ = loss_and_gradients(model)
    assert kernel
    assert got == pytest.approx(expected, rel=1e-6)


@torch.library.custom_op("loraport_tests::norm", mutates_args=())
def one(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return torch.rms_norm(x, weight.shape, weight, eps)


@torch.library.custom_op("loraport_tests::norm_backward", mutates_args=())
def another(slope: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    root = (x.float().square().mean(-1, keepdim=True) + eps).rsqrt()
    normal, weighted = x * root, slope * weight
    wide = root * (weighted - normal * (weighted * normal).mean(-1, keepdim=True))
    return wide.to(x.dtype)


def keep(ctx, inputs, output):
    assert output.shape == inputs[0].shape
    ctx.save_for_backward(*inputs[:2])
    ctx.eps = inputs[2]


def backward(ctx, slope):
    return another(slope, *ctx.saved_tensors, ctx.eps), None, None


one.register_autograd(backward, setup_context=keep)


class Operations(TorchDispatchMode):
    """Counts what a GPU would have to be told, views left out."""

    def __init__(self):
        super().__init__()
        self.seen = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen += not func.is_view and func.name() != "aten::detach"
        return func(*args, **(kwargs or {}))


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")
def test_a_gpu_is_told_half_of_what_peft_tells_it(monkeypatch):
    """Of a bfloat16 model's passes without its head, both in autocast as the tools have it."""

    def kernel(x, shape, weight, eps):
        assert shape == weight.shape
        return one(x, weight, eps)

    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

    def told(model):
        """Operations of both passes."""
        ids = torch.arange(1, 13)[None]
        with Operations() as operations:
            with torch.autocast("cpu", torch.bfloat16):
                hidden = model(input_ids=ids)[0]
            hidden.float().sum().backward()
        return operations.seen

    def base():
        return language_model("Llama", num_hidden_layers=6).bfloat16().model

    theirs = told(peft.get_peft_model(base(), peft.LoraConfig(r=2, target_modules=targets)))
    attach(model := base(), LoraOptions(rank=2, targets=tuple(targets)))
    matrices = RoundedMatrices(lora_layers(model).values(), torch.bfloat16)
    with matrices.provided():
        own = told(model)
    monkeypatch.setattr(F, "rms_norm", kernel)
    with fused(model, CPU), matrices.provided():
        ours = told(model)
    assert ours < 0.5 * theirs < own
