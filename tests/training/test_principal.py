"""PiSSA and OLoRA: trained as PEFT trains them, saved as plain LoRA for the base as it is."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from loraport.errors import LoraportError
from loraport.peft_layout.write import write_peft
from loraport.training import LoraOptions, adapter_of, attach

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

TARGETS = ("q_proj", "o_proj", "down_proj")


def tokens():
    return torch.randint(0, 256, (2, 9), generator=torch.Generator().manual_seed(3))


def descend(model, steps=5):
    """Plain gradient descent: no optimizer's division makes roundings large."""
    losses = []
    batch = tokens()
    for _ in range(steps):
        logits = model(input_ids=batch).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
        losses.append(loss.item())
        parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters), strict=True
        ):
            parameter.data -= 2.0 * gradient
    return losses


@pytest.mark.parametrize("init", ["pissa", "olora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_training_equals_peft_and_is_saved_as_plain_lora(llama, init, use_rslora, tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model

    base = llama  # float32: PEFT decomposes nothing else
    with torch.no_grad():
        expected_base = base(input_ids=tokens()).logits
    config = LoraConfig(
        r=3, lora_alpha=5, use_rslora=use_rslora, init_lora_weights=init, target_modules=[*TARGETS]
    )
    peft = get_peft_model(copy.deepcopy(base), config, autocast_adapter_dtype=False)
    mine = copy.deepcopy(base)
    lora = LoraOptions(rank=3, alpha=5, use_rslora=use_rslora, init=init, targets=TARGETS)
    attach(mine, lora)
    with torch.no_grad():
        torch.testing.assert_close(
            mine(input_ids=tokens()).logits, expected_base, atol=1e-6, rtol=0
        )
    expected = descend(peft)
    assert descend(mine) == pytest.approx(expected, rel=1e-5)
    attach(plain := copy.deepcopy(base), LoraOptions(rank=3, alpha=5, targets=TARGETS))
    control = descend(plain)
    assert abs(control[-1] - expected[-1]) > 1e-3 * expected[-1]

    adapter = adapter_of(mine, base_model="base")
    assert {module.rank for module in adapter.modules.values()} == {6}
    write_peft(adapter, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base, tmp_path / "adapter", autocast_adapter_dtype=False)
    with torch.no_grad():
        got = loaded(input_ids=tokens()).logits
        torch.testing.assert_close(got, mine(input_ids=tokens()).logits, rtol=0, atol=2e-5)
        assert (got - expected_base).abs().max() > 1e-2


def test_pissa_takes_the_largest_singular_values():
    model = nn.Sequential(nn.Linear(20, 12, bias=False)).double()
    layer = attach(model, LoraOptions(rank=4, alpha=6, init="pissa", targets=("0",)))["0"]
    weight = layer.base_layer.weight
    left = weight - layer.scaling * layer.initial_B @ layer.initial_A
    values = torch.linalg.svdvals(weight)
    torch.testing.assert_close(torch.linalg.svdvals(left)[:8], values[4:], rtol=1e-8, atol=1e-8)


def test_large_weights_are_decomposed_iteratively_and_start_equal_too(monkeypatch):
    from loraport.training.lora import principal

    monkeypatch.setattr(principal, "_WHOLE_UP_TO", 4)
    model = nn.Sequential(nn.Linear(40, 30)).double()
    x = torch.randn(5, 40).double()
    expected = model(x)
    state = torch.get_rng_state()
    layer = attach(model, LoraOptions(rank=4, init="pissa", targets=("0",)))["0"]
    assert torch.equal(state, torch.get_rng_state())
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-9)
    first = layer.initial_A.clone()
    values = torch.linalg.svdvals(layer.base_layer.weight)[:4]
    got = torch.linalg.svdvals(layer.scaling * layer.initial_B @ layer.initial_A)[:4]
    torch.testing.assert_close(got, values, rtol=1e-2, atol=0)
    again = nn.Sequential(layer.base_layer)
    attach(again, LoraOptions(rank=4, init="pissa", targets=("0",)))
    assert torch.equal(again[0].initial_A, first)


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_nothing_of_a_decomposition_stays_but_what_is_used(llama, init):
    """Whole, Q and R take more memory than the base's weights; `--dry-run` does not count them."""
    for layer in attach(llama, LoraOptions(rank=3, init=init)).values():
        for part in (layer.initial_A, layer.initial_B):
            assert part.untyped_storage().nbytes() == part.nbytes
            assert part.abs().max() > 0


def test_a_rank_beyond_the_weights_is_refused():
    model = nn.Sequential(nn.Linear(20, 5))
    with pytest.raises(LoraportError, match="0: init pissa: expected a rank up to the weight's 5"):
        attach(model, LoraOptions(rank=6, init="pissa", targets=("0",)))


@pytest.mark.parametrize("bits", [4, 8])
def test_the_weight_of_a_quantized_base_is_the_one_it_computes_with(bits):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    plain = nn.Linear(64, 48, bias=False)
    made = (
        bnb.nn.Linear4bit(64, 48, bias=False, quant_type="nf4", compute_dtype=torch.float32)
        if bits == 4
        else bnb.nn.Linear8bitLt(64, 48, bias=False, has_fp16_weights=False)
    )
    made.load_state_dict(plain.state_dict())
    model = nn.Sequential(made.to("cpu"))
    with torch.no_grad():
        computed = model(torch.eye(64)).T
    layer = attach(model, LoraOptions(rank=3, use_dora=True, targets=("0",)))["0"]
    # 8 bits: the input is rounded to 8 bits as well; those of the identity are exact.
    torch.testing.assert_close(layer.float_weight().float(), computed, rtol=0, atol=2e-3)
    assert (plain.weight - computed).abs().max() > (1e-2 if bits == 4 else 1e-4)
    torch.testing.assert_close(layer.magnitude, layer.float_weight().float().norm(dim=1))


@pytest.mark.parametrize("more", [{"alpha": -4}, {"alpha": 4, "alpha_pattern": {"q_proj": -4}}])
def test_pissa_takes_the_root_of_alpha(llama, more):
    """Control: OLoRA takes none, and begins at the base's own logits with a negative alpha, too."""
    with pytest.raises(LoraportError, match=r"alpha.*: expected a number above 0 for pissa.*-4"):
        LoraOptions(rank=4, init="pissa", **more)
    with torch.no_grad():
        before = llama(input_ids=tokens()).logits
        attach(llama, LoraOptions(rank=4, init="olora", **more))
        torch.testing.assert_close(llama(input_ids=tokens()).logits, before, rtol=1e-5, atol=1e-5)
