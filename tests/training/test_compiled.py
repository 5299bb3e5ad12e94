"""``--compile``: the losses of layers that are not compiled, and a sentence where it fails.

Up to the graphs: making kernels of them takes a minute, and is tested where there is a GPU.
"""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from loraport.errors import LoraportError
from loraport.training import LoopOptions, LoraOptions, attach, train
from loraport.training.base.frozen_base import checkpoint_activations
from loraport.training.data.batches import Row, collate
from loraport.training.kernels.compiled import compiled_layers
from loraport.training.losses.language_model import language_model_loss

# The compiler warns of what it does itself.
pytestmark = pytest.mark.filterwarnings("ignore")
LOOP = LoopOptions(steps=6, learning_rate=0.03, device="cpu")


def batches():
    """Rows of other lengths in every batch, as many as there are."""
    numbers = torch.Generator().manual_seed(0)
    made = []
    for length in (9, 14, 11, 20, 17, 8):
        drawn = torch.randint(250, (3, length), generator=numbers).tolist()
        made.append(collate([Row(tuple(row), tuple(row)) for row in drawn], 0))
    return made


def losses(model, loop=LOOP):
    return [loss for _, loss in train(model, batches(), language_model_loss, loop).losses]


def test_the_same_losses_at_any_length_with_and_without_checkpoints(llama, fresh):
    still = copy.deepcopy(llama)
    for model in (llama, fresh, still):
        attach(model, LoraOptions(rank=4))
        language_model_loss(model, batches()[0])  # what is measured once is measured before
    expected = losses(llama)
    control = losses(still, replace(LOOP, learning_rate=1e-9))
    checkpoint_activations(fresh, 1)  # the first of two layers
    with compiled_layers(fresh, "aot_eager"):
        got = losses(fresh)
    assert got == pytest.approx(expected, abs=1e-5)  # sums in another order, in float32
    assert expected[-1] < control[-1] - 1e-3
    assert all(layer._compiled_call_impl is None for layer in fresh.model.layers)


def test_what_cannot_be_compiled_says_so(llama):
    with (
        pytest.raises(LoraportError, match="--compile: expected a model with repeated layers"),
        compiled_layers(nn.Linear(2, 2)),
    ):
        pass

    def broken(*_):
        raise RuntimeError("no compiler\nmore")

    attach(llama, LoraOptions(rank=4))
    with (
        pytest.raises(LoraportError, match=r"LlamaDecoderLayer cannot be compiled here: .*; leave"),
        compiled_layers(llama, backend=broken),
    ):
        train(llama, batches(), language_model_loss, replace(LOOP, steps=1))
