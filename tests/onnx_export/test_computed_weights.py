"""Layers whose weights torch computes in every pass: weight norm and spectral norm, old and new."""

import warnings

import numpy as np
import pytest
import torch
from peft_cases import Case, make_case
from torch import nn
from torch.nn.utils import parametrizations

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters, export_torch_module
from converters.onnx.slots.inserting import SlotOptions
from loraport.bundle.manifest import read_manifest
from loraport.parity import Sample, verify_bundle
from loraport.runtime import Runtime
from loraport.training.modes import training_mode

LAYERS = ["first", "second", "third", "fourth"]


class Normed(nn.Module):
    """A kind of norm at each layer."""

    def __init__(self):
        super().__init__()
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # the two old ones are deprecated, and still in models
            self.first = nn.utils.weight_norm(nn.Linear(6, 7))
            self.third = nn.utils.spectral_norm(nn.Conv1d(8, 5, 3))
        self.second = parametrizations.weight_norm(nn.Conv1d(7, 8, 3, padding=1))
        self.fourth = parametrizations.spectral_norm(nn.Linear(5, 4))

    def forward(self, x):
        hidden = self.second(torch.tanh(self.first(x)).transpose(1, 2))
        return self.fourth(torch.tanh(self.third(torch.tanh(hidden))).transpose(1, 2))


@pytest.fixture
def normed():
    torch.manual_seed(0)
    model = Normed().eval().requires_grad_(False)
    model.first.weight_g.mul_(torch.linspace(0.5, 2, 7)[:, None])  # no longer the norm of v
    return model


def test_every_layer_takes_an_adapter(normed, tmp_path):
    options = {"target_modules": LAYERS, "r": 3, "lora_alpha": 5}
    made, out = make_case(Case(Normed, options), tmp_path / "a", base=normed), tmp_path / "bundle"
    x = torch.randn(2, 9, 6)
    base, expected = normed(x), made.peft_model(x).detach()
    state = {name: tensor.clone() for name, tensor in normed.state_dict().items()}
    export_torch_module(normed, {"x": x}, out, slots=SlotOptions(("lora", "conv")))
    assert torch.equal(normed(x), base)  # the model is what it was
    after = normed.state_dict()
    assert list(after) == list(state)
    assert all(torch.equal(after[name], tensor) for name, tensor in state.items())
    manifest = read_manifest(out)
    assert [slot.name for slot in manifest.slots.slots] == LAYERS
    assert manifest.unslotted == {}
    adapter = read_adapter(made.path)
    add_adapters(out, {"a": adapter})
    runtime, feeds = Runtime(out), {"x": x.numpy()}
    for name, wanted in ((None, base), ("a", expected)):
        (got,) = runtime.run(feeds, name).values()
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert (expected - base).abs().max() > 0.1
    report = verify_bundle(out, normed, {"a": adapter}, samples=[Sample(feeds, feeds)])
    assert report.passed, [check for check in report.checks if not check.passed]


def test_spectral_norms_of_a_frozen_base_do_not_move_in_training(normed):
    before = {name: tensor.clone() for name, tensor in normed.state_dict().items()}

    def moved():
        return {k for k, v in normed.state_dict().items() if not torch.equal(v, before[k])}

    with training_mode(normed):
        assert normed.training
        normed(torch.randn(2, 9, 6))
    assert moved() == set()
    normed.train()(torch.randn(2, 9, 6))  # the control: torch's own training mode moves them
    assert {name.split(".")[0] for name in moved()} == {"third", "fourth"}
