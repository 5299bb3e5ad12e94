"""Batch norms stay beside the products they follow, whose slots take what PEFT trained."""

import copy

import numpy as np
import pytest
import torch
from peft_cases import Case, make_case
from torch import nn

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters, export_torch_module
from converters.onnx.slots.inserting import SlotOptions
from loraport.bundle.manifest import read_manifest
from loraport.parity import Sample, verify_bundle
from loraport.runtime import Runtime


class ResNet(nn.Module):
    """Convolutions with and without a bias and a linear layer, a normalization behind each."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, bias=False)
        self.norm1 = nn.BatchNorm2d(6)
        self.line = nn.Conv1d(6, 8, 3, padding=1)
        self.norm2 = nn.BatchNorm1d(8)
        self.wide = nn.Linear(8, 10)
        self.norm3 = nn.BatchNorm1d(10)
        self.head = nn.Linear(10, 4)

    def forward(self, image):
        hidden = torch.relu(self.norm1(self.stem(image)))
        hidden = torch.relu(self.norm2(self.line(hidden.mean(3))))
        return self.head(torch.tanh(self.norm3(self.wide(hidden.mean(2)))))


LAYERS = ["stem", "line", "wide", "head"]


@pytest.fixture(scope="module")
def resnet():
    torch.manual_seed(0)
    module = ResNet()
    with torch.no_grad():
        module(3 * torch.randn(64, 3, 6, 5) + 1)  # in training: its statistics are its own
    return module.eval()


@pytest.fixture(scope="module")
def resnet_bundle(resnet, tmp_path_factory):
    out = tmp_path_factory.mktemp("resnet") / "bundle"
    slots = SlotOptions(("lora", "conv"))
    export_torch_module(resnet, {"image": torch.randn(2, 3, 6, 5)}, out, slots=slots)
    return out


def test_products_before_a_normalization_take_adapters(resnet, resnet_bundle, tmp_path):
    manifest = read_manifest(resnet_bundle)
    assert [slot.name for slot in manifest.slots.slots] == LAYERS
    assert manifest.unslotted == {}
    made = make_case(Case(ResNet, {"target_modules": LAYERS, "r": 3}), tmp_path, base=resnet)
    adapter = read_adapter(made.path)
    add_adapters(resnet_bundle, {"a": adapter})
    image = torch.randn(5, 3, 6, 5)
    with torch.no_grad():
        base, adapted = (
            copy.deepcopy(model).double()(image.double()) for model in (resnet, made.peft_model)
        )
    runtime, inputs = Runtime(resnet_bundle), {"image": image.numpy()}
    for name, expected in ((None, base), ("a", adapted)):
        (got,) = runtime.run(inputs, name).values()
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert (adapted - base).abs().max() > 0.1
    report = verify_bundle(resnet_bundle, resnet, {"a": adapter}, samples=[Sample(inputs, inputs)])
    assert report.passed, [check for check in report.checks if not check.passed]
