"""Training beside a base in 4 and 8 bits: PEFT's losses on the same quantized model."""

import copy
import json
import sys
import warnings

import pytest
import torch
import torch.nn.functional as F

from loraport.base.loading import fingerprint_model
from loraport.errors import LoraportError
from loraport.peft_layout import read_peft
from loraport.training import LoopOptions, LoraOptions, TrainOptions, attach, train_language_model
from loraport.training.base.quantized_base import quantize_linears

CPU = torch.device("cpu")
RANK, RATE, STEPS = 4, 1e-2, 6


@pytest.fixture(autouse=True)
def _their_warnings():
    """bitsandbytes says that it rounds inputs; transformers' and its deprecations are theirs."""
    pytest.importorskip("bitsandbytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def losses(model, parameters):
    optimizer = torch.optim.AdamW(parameters, lr=RATE, weight_decay=0.0)
    tokens = torch.randint(256, (3, 17), generator=torch.Generator().manual_seed(3))
    told = []
    model.train()
    for _ in range(STEPS):
        logits = model(input_ids=tokens).logits[:, :-1].flatten(0, 1)
        loss = F.cross_entropy(logits, tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        told.append(loss.item())
    return told


@pytest.mark.parametrize(("kind", "tolerance"), [("nf4", 1e-5), ("int8", 2e-3)])
def test_the_same_losses_as_peft_step_by_step(llama, kind, tolerance):
    """Control: on the unquantized base the losses differ by more than the tolerance.

    int8 rounds each activation too, so float32 noise can move a number to the next step.
    """
    from peft import LoraConfig, get_peft_model

    plain = copy.deepcopy(llama)
    quantize_linears(llama, kind, CPU)
    theirs = get_peft_model(
        copy.deepcopy(llama),
        LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", lora_dropout=0),
    )
    layers = attach(llama, LoraOptions(rank=RANK))
    exact = attach(plain, LoraOptions(rank=RANK))
    with torch.no_grad():
        for path, layer in layers.items():
            other = theirs.base_model.model.get_submodule(path)
            layer.lora_A.copy_(other.lora_A["default"].weight)
            exact[path].lora_A.copy_(layer.lora_A)
    expected = losses(theirs, [p for p in theirs.parameters() if p.requires_grad])
    got = losses(llama, [p for p in llama.parameters() if p.requires_grad])
    control = losses(plain, [p for p in plain.parameters() if p.requires_grad])
    assert got == pytest.approx(expected, rel=tolerance)
    assert max(abs(a - b) for a, b in zip(control, expected, strict=True)) > 1e-4
    assert expected[0] != pytest.approx(expected[-1], rel=10 * tolerance)


@pytest.mark.parametrize("kind", ["bfloat16", "nf4", "int8"])
def test_train_writes_the_true_bases_fingerprint(base_directory, chat_data, tmp_path, llama, kind):
    out = tmp_path / "adapter"
    options = TrainOptions(
        lora=LoraOptions(rank=RANK), loop=LoopOptions(steps=5, learning_rate=0.02), base_dtype=kind
    )
    summary = train_language_model(str(base_directory), chat_data, out, options)
    assert summary.validation_loss < summary.base_validation_loss
    adapter = read_peft(out)
    assert adapter.base_fingerprint == fingerprint_model(llama, list(adapter.modules))
    lines = (out / "metrics.jsonl").read_text().splitlines()
    assert len([line for line in lines if "gradient_norm" in json.loads(line)]) == 5


def test_a_quantized_base_takes_less_memory(llama):
    from loraport.training.base.frozen_base import narrow

    def size(model):
        return sum(p.numel() * p.element_size() for p in model.model.layers.parameters())

    whole = size(llama)
    narrow(copy.deepcopy(llama), "auto", None)
    quantize_linears(llama, "nf4", CPU)
    assert size(llama) < whole / 6  # 8 times less, but for the norms


def test_without_bitsandbytes_it_says_what_to_install(llama, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(LoraportError, match=r"--base-dtype nf4: .*loraport\[quantized-training\]"):
        quantize_linears(llama, "nf4", CPU)
