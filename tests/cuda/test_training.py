"""Training on a GPU: the same numbers as float64 on the CPU, exact resume, quantized bases."""

import contextlib
import copy
import itertools
import shutil
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from tiny_llm import SIZES
from torch import nn

from loraport.errors import LoraportError
from loraport.sweep.loss import grouped_language_model_loss
from loraport.sweep.together import train_together
from loraport.sweep.trial import Trial
from loraport.training import LoopOptions, LoraOptions, adapter_of, attach, train
from loraport.training.data.batches import IGNORED, Row
from loraport.training.data.end_to_end import lay_end_to_end
from loraport.training.data.packing import make_batches
from loraport.training.devices import choose_placement
from loraport.training.kernels.cuda_graphs import RecordedPasses
from loraport.training.kernels.fused_norms import fused_norms
from loraport.training.kernels.recorder import on_gpu
from loraport.training.kernels.row_attention import use_row_attention
from loraport.training.lora.inject import lora_layers
from loraport.training.losses.language_model import language_model_loss

RATES = (1e-4, 1e-2)


@pytest.fixture
def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def batches(count=6):
    numbers = torch.Generator().manual_seed(3)
    return [torch.randint(0, 256, (4, 24), generator=numbers)] * count  # what can be learnt


def lm_loss(model, tokens):
    logits = model(input_ids=tokens).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def loop(**more):
    return LoopOptions(**{"steps": 6, "learning_rate": 0.03, "device": "cuda", **more})


@pytest.mark.parametrize(
    ("base", "dtype", "bound"),
    [
        (torch.float32, "float32", 1e-3),
        (torch.float32, "bfloat16", 5e-2),
        (torch.bfloat16, "bfloat16", 5e-2),
    ],
)
@pytest.mark.parametrize("use_dora", [False, True])
def test_losses_are_those_of_float64_on_the_cpu(llama, base, dtype, bound, use_dora):
    lora = LoraOptions(rank=4, use_dora=use_dora)
    reference = copy.deepcopy(llama.to(base)).double()
    attach(reference, lora)
    expected = train(reference, batches(), lm_loss, loop(device="cpu", dtype="float32")).losses
    attach(llama, lora)
    got = train(llama, batches(), lm_loss, loop(dtype=dtype)).losses
    for (_, mine), (_, other) in zip(got, expected, strict=True):
        assert mine == pytest.approx(other, abs=bound)
    assert expected[0][1] - expected[-1][1] > 2 * bound  # it learns more than is tolerated
    assert next(llama.parameters()).is_cuda


@pytest.mark.filterwarnings("ignore")  # of the compiler, about itself
@pytest.mark.parametrize("options", [LoraOptions(rank=4), LoraOptions(rank=4, use_dora=True)])
def test_compiled_layers_have_the_same_losses(llama, options):
    from loraport.training.kernels.compiled import compiled_layers

    attach(plain := copy.deepcopy(llama), options)
    expected = train(plain, batches(), lm_loss, loop(dtype="float32")).losses
    attach(llama, options)
    with compiled_layers(llama):
        got = train(llama, batches(), lm_loss, loop(dtype="float32")).losses
    for (_, mine), (_, other) in zip(got, expected, strict=True):
        assert mine == pytest.approx(other, abs=1e-3)  # 24-bit mantissas, sums in another order
    assert expected[0][1] - expected[-1][1] > 2e-3


def text_batches(model):
    """Rows of many lengths in few shapes."""
    numbers = torch.Generator().manual_seed(5)
    rows = []
    for index in range(24):
        tokens = torch.randint(250, (4 + 3 * (index % 5),), generator=numbers).tolist()
        rows.append(Row(tuple(tokens), tuple(tokens)))
    return make_batches(model, rows, 4, 0, 0, packing="auto", max_length=32, few_lengths=True)


def recorded(model, options, lora, *, within_rows=False, tentative=False, **more):
    """Train with recorded passes; the losses, and what records."""
    attach(model, lora)
    model.to("cuda")  # the head is measured where it will be
    if within_rows:
        assert use_row_attention(model, choose_placement("cuda", options.dtype), 32)
    hidden = RecordedPasses(model, tentative=tentative)
    loss = partial(language_model_loss, hidden=hidden)
    outside = torch.cuda.current_stream()
    with hidden.stream():
        result = train(model, text_batches(model), loss, options, **more)
    assert torch.cuda.current_stream() == outside
    return result.losses, hidden


def test_attention_within_rows_has_the_gradients_of_masks(llama):
    """Rows of other lengths, padding at the end, fewer heads of keys."""
    numbers = torch.Generator().manual_seed(5)
    drawn = [torch.randint(250, (n,), generator=numbers).tolist() for n in (5, 70, 33)]
    rows = [Row(tuple(tokens), tuple(tokens)) for tokens in drawn]
    sequences = [rows, rows[1:]]
    batch = lay_end_to_end(sequences, 0, share=False).lengthened(128, 0).to(torch.device("cuda"))
    tokens = tuple(itertools.chain(*drawn))
    joined = Row(tokens, tuple(itertools.chain(*([IGNORED, *each[1:]] for each in drawn))))
    others = lay_end_to_end([[joined], rows[1:]], 0).to(torch.device("cuda"))
    placement = choose_placement("cuda", "bfloat16")
    attach(llama.to("cuda"), LoraOptions(rank=4))
    for layer in lora_layers(llama).values():
        nn.init.normal_(layer.lora_B, std=0.3)

    def gradients(batch, model):
        model.zero_grad()
        with placement.autocast():
            language_model_loss(model, batch).total.backward()
        return {n: p.grad.double() for n, p in model.named_parameters() if p.requires_grad}

    exact = copy.deepcopy(llama).double()
    placement = choose_placement("cuda", "float32")
    expected, wrong = gradients(batch, exact), gradients(others, exact)
    placement = choose_placement("cuda", "bfloat16")
    masked = gradients(batch, llama)
    assert use_row_attention(llama, placement, 128)
    got = gradients(batch, llama)
    for name, gradient in expected.items():
        far, theirs = ((each[name] - gradient).norm() for each in (got, masked))
        assert far < 2 * theirs + 1e-2 * gradient.norm(), name
        assert 0 < far < 0.1 * gradient.norm(), name
    assert any((wrong[n] - g).norm() > 0.2 * g.norm() for n, g in expected.items())


@pytest.mark.parametrize(
    ("dtype", "more"),
    [
        ("float32", ""),
        ("bfloat16", ""),
        ("bfloat16", "rows"),
        ("bfloat16", "liger"),
    ],
)
@pytest.mark.parametrize(
    "lora", [LoraOptions(rank=4), LoraOptions(rank=4, use_dora=True), LoraOptions(rank=4, alpha=3)]
)
def test_recorded_passes_have_the_same_losses(llama, lora, dtype, more):
    options = loop(steps=30, accumulate=2, dtype=dtype, learning_rate=0.01)
    attach(plain := copy.deepcopy(llama), lora)
    expected = train(plain, text_batches(plain), language_model_loss, options).losses
    during = contextlib.nullcontext()
    if more == "liger":
        pytest.importorskip("liger_kernel")
        from loraport.training.kernels.liger_kernels import liger_kernels

        during = liger_kernels(llama, torch.device("cuda"))
    with during:
        got, hidden = recorded(llama, options, lora, within_rows=more == "rows")
    assert hidden.recorded >= 2
    bound = 1e-3 if dtype == "float32" else 2e-2
    for (_, mine), (_, other) in zip(got, expected, strict=True):
        assert mine == pytest.approx(other, abs=bound)
    assert expected[0][1] - expected[-1][1] > 4 * bound


@pytest.mark.parametrize("within_rows", [False, True])
def test_a_recorded_run_resumed_equals_one_never_stopped(llama, within_rows, tmp_path):
    """Shapes are recorded at other steps then; what is dropped out is the same."""
    lora = LoraOptions(rank=4, dropout=0.2)
    options = loop(steps=24, save_every=11, keep=9)
    fresh, other = copy.deepcopy(llama), copy.deepcopy(llama)
    whole, _ = recorded(llama, options, lora, within_rows=within_rows, work=tmp_path / "whole")
    (tmp_path / "work").mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-00000011", tmp_path / "work/checkpoint-00000011")
    shutil.copy(tmp_path / "whole/metrics.jsonl", tmp_path / "work")
    work = {"work": tmp_path / "work", "resume": True}
    resumed, _ = recorded(fresh, options, lora, within_rows=within_rows, **work)
    assert resumed == whole
    mine, others = adapter_of(fresh), adapter_of(llama)
    for path, module in mine.modules.items():
        assert torch.equal(module.lora_A, others.modules[path].lora_A)
        assert torch.equal(module.lora_B, others.modules[path].lora_B)
    still, _ = recorded(other, replace(options, seed=1), lora)
    assert still != whole


def test_what_waits_for_the_gpu_cannot_be_recorded_and_says_so(llama):
    def asks(_, inputs):
        assert inputs[0].isfinite().all()  # the host waits for the answer

    llama.model.layers[0].mlp.register_forward_pre_hook(asks)
    with pytest.raises(LoraportError, match="--cuda-graphs: a pass of LlamaForCausalLM cannot be"):
        recorded(llama, loop(steps=30), LoraOptions(rank=4))
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    drawn = torch.rand(8, device="cuda")  # the process goes on
    assert drawn.unique().numel() == 8


@pytest.mark.parametrize("waits", [False, True])
def test_where_nothing_is_asked_what_waits_for_the_gpu_is_not_recorded(llama, waits):
    def asks(_, inputs):
        if waits:
            assert inputs[0].isfinite().all()

    lora, options = LoraOptions(rank=4, dropout=0.2), loop(steps=30, learning_rate=0.01)
    attach(plain := copy.deepcopy(llama), lora)
    expected = train(plain, text_batches(plain), language_model_loss, options).losses
    llama.model.layers[0].mlp.register_forward_pre_hook(asks)
    got, hidden = recorded(llama, options, lora, tentative=True)
    assert (hidden.recorded >= 2) is not waits
    for (_, mine), (_, other) in zip(got, expected, strict=True):
        assert mine == pytest.approx(other, abs=2e-2)
    assert expected[0][1] - expected[-1][1] > 8e-2


@pytest.mark.parametrize("within_rows", [False, True])
def test_a_recorded_sweep_has_the_same_losses(llama, within_rows):
    """Ranks of two sizes, and DoRA beside them."""

    def trials():
        plain = [Trial(f"{r} {rate}", LoraOptions(rank=r), rate) for r in (2, 4) for rate in RATES]
        return [*plain, Trial("dora", LoraOptions(rank=2, use_dora=True), 1e-3)]

    numbers = torch.Generator().manual_seed(5)
    drawn = [torch.randint(250, (4 + 3 * (i % 5),), generator=numbers).tolist() for i in range(24)]
    rows = tuple(Row(tuple(tokens), tuple(tokens)) for tokens in drawn)
    options = loop(steps=30, dtype="bfloat16", learning_rate=1e-3)
    llama.to("cuda")
    if within_rows:
        assert use_row_attention(llama, choose_placement("cuda", "bfloat16"), 32)

    def losses(recorder):
        made = make_batches(llama, rows, 4, 0, 0, packing="auto", max_length=32, few_lengths=True)
        given = llama, trials(), made, grouped_language_model_loss, options
        return {name: o.losses for name, o in train_together(*given, recorder=recorder).items()}

    expected, recorder = losses(None), on_gpu(llama)
    graphs = torch.cuda.CUDAGraph
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "CUDAGraph", lambda: made.append(graphs()) or made[-1])
        got = losses(recorder)
    assert len(made) >= 4
    for name, theirs in expected.items():
        for (_, mine), (_, other) in zip(got[name], theirs, strict=True):
            assert mine == pytest.approx(other, abs=2e-2)
    fast, slow = expected["4 0.01"], expected["4 0.0001"]
    assert slow[-1][1] - fast[-1][1] > 0.1


def test_those_that_are_left_are_recorded_anew_when_one_ends(llama):
    """Its rate is absurd, so that its validation loss rises at once."""
    trials = [Trial(f"{rate}", LoraOptions(rank=4), rate) for rate in (1e-2, 3e-3, 1e3)]
    numbers = torch.Generator().manual_seed(5)
    drawn = [torch.randint(250, (12,), generator=numbers).tolist() for _ in range(16)]
    rows = tuple(Row(tuple(tokens), tuple(tokens)) for tokens in drawn)
    options = loop(steps=24, validate_every=6, early_stopping=1, learning_rate=1e-3)
    llama.to("cuda")

    def outcomes(recorder):
        layout = {"packing": "auto", "max_length": 32}
        made = make_batches(llama, rows, 4, 0, 0, few_lengths=True, **layout)
        held_out = make_batches(llama, rows[:4], 4, 0, None, **layout)
        given = llama, trials, made, grouped_language_model_loss, options
        return train_together(*given, validation=held_out, recorder=recorder)

    expected, got = outcomes(None), outcomes(on_gpu(llama))
    assert len(got["1000.0"].losses) < 24
    for name in ("0.01", "0.003"):
        assert len(got[name].losses) == 24
        for (_, mine), (_, other) in zip(got[name].losses, expected[name].losses, strict=True):
            assert mine == pytest.approx(other, abs=2e-2)
    assert expected["0.003"].losses[-1][1] - expected["0.01"].losses[-1][1] > 0.1


@pytest.mark.parametrize("autocast", [False, True])
def test_a_norm_is_one_kernel_a_pass_and_computes_the_same(llama, autocast):
    """Against float64; a GPU is told nothing of a norm's single operations."""
    llama.bfloat16().cuda().requires_grad_(False)
    norms = [module for module in llama.modules() if type(module).__name__ == "LlamaRMSNorm"]
    assert len(norms) == 2 * SIZES["num_hidden_layers"] + 1
    x = torch.randn(3, 7, SIZES["hidden_size"], dtype=torch.bfloat16, device="cuda")
    slope = torch.randn_like(x)

    def passes():
        """Output and gradient through the last norm, and what was called."""
        given = x.clone().requires_grad_()
        with (
            torch.profiler.profile(acc_events=True) as profiled,
            torch.autocast("cuda", enabled=autocast),
        ):
            y = norms[-1](given)
            y.backward(slope)
        return y, given.grad, {event.name for event in profiled.events()}

    nn.init.uniform_(norms[-1].weight, 0.5, 1.5)
    _, _, own = passes()
    with fused_norms(llama, torch.device("cuda")):
        assert all("forward" in vars(module) for module in norms)
        got, gradient, called = passes()
    assert {"aten::_fused_rms_norm", "aten::_fused_rms_norm_backward"} <= called
    assert "aten::rsqrt" in own
    assert "aten::rsqrt" not in called
    wide = x.double().requires_grad_()
    epsilon = norms[-1].variance_epsilon
    exact = F.rms_norm(wide, x.shape[-1:], norms[-1].weight.double(), epsilon)
    exact.backward(slope.double())
    assert got.dtype is torch.bfloat16
    for mine, other in ((got, exact), (gradient, wide.grad)):
        torch.testing.assert_close(mine.double(), other, rtol=2**-7, atol=2**-9)
        assert not torch.allclose(mine.double(), 1.05 * other, rtol=2**-7, atol=2**-9)


def test_liger_kernels_have_the_same_losses(llama):
    pytest.importorskip("liger_kernel")
    from loraport.training.kernels.liger_kernels import liger_kernels

    lora = LoraOptions(rank=4)
    attach(plain := copy.deepcopy(llama), lora)
    expected = train(plain, batches(), lm_loss, loop(dtype="float32")).losses
    before = llama.model.norm.forward
    with liger_kernels(llama, torch.device("cuda")):
        assert llama.model.norm.forward != before
        attach(llama, lora)
        got = train(llama, batches(), lm_loss, loop(dtype="float32")).losses
    for (_, mine), (_, other) in zip(got, expected, strict=True):
        assert mine == pytest.approx(other, abs=1e-3)
    assert expected[0][1] - expected[-1][1] > 2e-3


@pytest.mark.parametrize("optimizer", ["adamw", "adamw-8bit", "paged-adamw-8bit"])
def test_a_run_resumed_equals_one_never_stopped(llama, optimizer, tmp_path):
    if optimizer != "adamw":
        pytest.importorskip("bitsandbytes")
    lora = LoraOptions(rank=128, dropout=0.1)  # 4096 numbers and more: 8 bits are for those alone
    attach(whole := copy.deepcopy(llama), lora)
    options = loop(save_every=3, keep=9, optimizer=optimizer)
    train(whole, batches(), lm_loss, options, work=tmp_path / "whole")
    (tmp_path / "work").mkdir()
    shutil.copytree(tmp_path / "whole/checkpoint-00000003", tmp_path / "work/checkpoint-00000003")
    shutil.copy(tmp_path / "whole/metrics.jsonl", tmp_path / "work")
    attach(llama, lora)
    train(llama, batches(), lm_loss, options, work=tmp_path / "work", resume=True)
    mine, others = adapter_of(llama), adapter_of(whole)
    for path, module in mine.modules.items():
        assert torch.equal(module.lora_A, others.modules[path].lora_A)
        assert torch.equal(module.lora_B, others.modules[path].lora_B)


@pytest.mark.parametrize("bits", [4, 8])
def test_a_quantized_base_gets_the_gradients_of_its_own_weights(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    if bits == 4:
        layer = bnb.nn.Linear4bit(64, 48, bias=False, quant_type="nf4", compute_dtype=torch.float32)
    else:
        layer = bnb.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False)
    model = nn.Sequential(layer).to("cuda")
    x = torch.randn(32, 64, device="cuda")
    with torch.no_grad():
        weight = model(torch.eye(64, device="cuda")).T.double()
    lora = attach(model, LoraOptions(rank=4, targets=("0",)))["0"]
    nn.init.normal_(lora.lora_B)
    a, b = (p.detach().double().requires_grad_() for p in (lora.lora_A, lora.lora_B))
    expected = x.double() @ (weight + lora.scaling * b @ a).T
    expected.square().mean().backward()
    model(x).square().mean().backward()
    for mine, other in ((lora.lora_A, a), (lora.lora_B, b)):
        difference = (mine.grad.double() - other.grad).norm() / other.grad.norm()
        assert difference < (1e-3 if bits == 4 else 5e-2)  # 8 bits round the input too
