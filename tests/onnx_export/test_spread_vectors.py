"""Vectors that are spread over channels keep their names, so that they can be replaced."""

import numpy as np
import torch
from peft_cases import Case, make_case
from torch import nn

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters, export_torch_module
from converters.onnx.slots.inserting import SlotOptions
from loraport.bundle.manifest import read_manifest
from loraport.parity import verify_bundle
from loraport.runtime import Runtime


class Block(nn.Module):
    """A group norm as it is made, all ones, and a layer scale of ones, too."""

    def __init__(self):
        super().__init__()
        self.mix = nn.Conv2d(3, 8, 3)
        self.norm = nn.GroupNorm(2, 8)
        self.scale = nn.Parameter(torch.ones(8))
        self.head = nn.Linear(8, 4)

    def forward(self, image):
        hidden = torch.tanh(self.norm(self.mix(image))) * self.scale[:, None, None]
        return self.head(hidden.mean((2, 3)))


def test_group_norms_and_layer_scales_are_replaced(tmp_path):
    torch.manual_seed(0)
    net, out = Block().eval(), tmp_path / "bundle"
    options = {"target_modules": ["head"], "modules_to_save": ["norm"], "r": 2}
    case = make_case(Case(Block, options), tmp_path / "a", base=net)
    image = torch.randn(2, 3, 6, 5)
    slots = SlotOptions(("lora",), replace=("norm", "scale"))
    export_torch_module(net, {"image": image}, out, slots=slots)
    replaced = {slot.parameter for slot in read_manifest(out).slots.replacements}
    assert replaced == {"norm.weight", "norm.bias", "scale"}
    adapter = read_adapter(case.path)
    add_adapters(out, {"a": adapter})
    with torch.no_grad():
        base, expected = net(image), case.peft_model(image)
    runtime, inputs = Runtime(out), {"image": image.numpy()}
    for name, wanted in ((None, base), ("a", expected)):
        (got,) = runtime.run(inputs, name).values()
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    saved = case.peft_model.base_model.model.norm.modules_to_save["default"].weight
    assert (saved - 1).abs().max() > 0.01
    assert (expected - base).abs().max() > 0.05
    report = verify_bundle(out, net, {"a": adapter})
    assert report.passed, [check for check in report.checks if not check.passed]
