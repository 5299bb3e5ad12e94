"""The same run in PEFT and in loraport ends at the same validation loss, over three seeds.

PEFT's side is its own model and a plain loop: AdamW, the norm clipped, the same schedule, the mean
over labelled tokens as transformers computes it.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GPT2Config, GPT2LMHeadModel, get_cosine_schedule_with_warmup

from loraport.training import LoopOptions, LoraOptions, attach, train
from loraport.training.data.batches import IGNORED, Row, RowBatches
from loraport.training.losses.language_model import language_model_loss
from loraport.training.run.schedule import learning_rate

# PEFT asks transformers 5.23 by a name that it renamed.
pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OPTIONS = LoraOptions(rank=4, alpha=8, targets=tuple(TARGETS))
STEPS, RATE, WARMUP, DECAY, CLIP = 40, 0.01, 0.1, 0.1, 1.0
CLOSE = 1e-5  # relative, of float32 sums in another order, over all steps


def rows(seed, count):
    """Texts of unlike length whose next token is learnable: twice the last, some of it noise."""
    numbers = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        tokens = [int(numbers.integers(1, 200))]
        while len(tokens) < numbers.integers(6, 24):
            noise = int(numbers.integers(0, 3)) if numbers.random() < 0.3 else 0
            tokens.append((2 * tokens[-1] + noise) % 200)
        labels = [IGNORED, IGNORED, *tokens[2:]]
        made.append(Row(tuple(tokens), tuple(labels)))
    return made


def batches(seed):
    return (
        RowBatches(rows(seed, 4 * STEPS), 4, 258, seed),
        RowBatches(rows(seed + 100, 24), 4, 258, None),
    )


def loop_options(seed, rate=RATE):
    return LoopOptions(
        learning_rate=rate,
        steps=STEPS,
        warmup=WARMUP,
        weight_decay=DECAY,
        clip=CLIP,
        seed=seed,
        device="cpu",
        dtype="float32",
    )


def with_loraport(model, seed, rate=RATE, targets=TARGETS):
    """Train; return the matrices at the start, all losses and the validation loss."""
    layers = attach(model, replace(OPTIONS, seed=seed, targets=tuple(targets)))
    start = {
        path: (p.lora_A.detach().clone(), p.lora_B.detach().clone()) for path, p in layers.items()
    }
    data, held_out = batches(seed)
    result = train(model, data, language_model_loss, loop_options(seed, rate), validation=held_out)
    return start, [loss for _, loss in result.losses], result.validations


def mean_loss(model, batch):
    return model(input_ids=batch.tokens, attention_mask=batch.mask, labels=batch.labels).loss


def with_peft(base, seed, start, targets=TARGETS):
    config = LoraConfig(r=OPTIONS.rank, lora_alpha=OPTIONS.alpha, target_modules=targets)
    model = get_peft_model(base, config)
    with torch.no_grad():
        for path, (a, b) in start.items():
            layer = model.base_model.model.get_submodule(path)
            layer.lora_A["default"].weight.copy_(a)
            layer.lora_B["default"].weight.copy_(b)
    data, held_out = batches(seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=DECAY)
    model.train()
    losses = []
    for step, batch in enumerate(data.epoch(0), start=1):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, RATE, WARMUP)
        loss = mean_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        losses.append(loss.item())
    model.eval()
    total = count = 0.0
    with torch.no_grad():
        for batch in held_out.epoch(0):
            counted = int((batch.labels[:, 1:] != IGNORED).sum())
            total, count = total + mean_loss(model, batch).item() * counted, count + counted
    return losses, total / count


@pytest.mark.parametrize(
    ("total", "warmup", "rising"),
    [(1, 0.0, 0), (1, 0.9, 1), (7, 0.3, 2), (40, 0.1, 4), (3, 0.99, 3)],
)
def test_rates_are_those_of_transformers_without_its_first_and_last_which_are_zero(
    total, warmup, rising
):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=RATE)
    (theirs,) = get_cosine_schedule_with_warmup(optimizer, rising, total + 1).lr_lambdas
    own = [learning_rate(step, total, RATE, warmup) for step in range(1, total + 1)]
    assert own == pytest.approx([RATE * theirs(step) for step in range(1, total + 1)], rel=1e-12)
    assert min(own) > theirs(total + 1) == 0


def test_the_same_run_ends_at_the_same_validation_loss(llama):
    ends = []
    for seed in (0, 1, 2):
        start, losses, validations = with_loraport(copy.deepcopy(llama), seed)
        expected, validation = with_peft(copy.deepcopy(llama), seed, start)
        assert len(losses) == STEPS
        np.testing.assert_allclose(losses, expected, rtol=CLOSE)
        assert validations[-1][1] == pytest.approx(validation, rel=CLOSE)
        # It learned something: otherwise all runs would end alike.
        assert validation < validations[0][1] - 0.1
        ends.append((validations[-1][1], validation))
    spread = np.std([end for end, _ in ends])
    assert max(abs(own - theirs) for own, theirs in ends) < 0.01 * spread
    # The control: a rate a tenth lower ends elsewhere.
    _, _, other = with_loraport(copy.deepcopy(llama), 0, rate=0.9 * RATE)
    assert abs(other[-1][1] - ends[0][1]) > 50 * CLOSE * ends[0][1]


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False:UserWarning")
def test_conv1d_layers_take_the_same_steps():
    """GPT-2, whose weights are stored ``[in, out]`` and one of them square."""
    torch.manual_seed(0)
    still = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    sizes = {"vocab_size": 272, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, **still)).eval()
    targets = ["c_attn", "c_proj", "c_fc"]
    start, losses, validations = with_loraport(copy.deepcopy(model), 0, targets=targets)
    assert len(start) == 8
    expected, validation = with_peft(model, 0, start, targets)
    np.testing.assert_allclose(losses, expected, rtol=CLOSE)
    assert validations[-1][1] == pytest.approx(validation, rel=CLOSE)
    assert validation < validations[0][1] - 0.1
