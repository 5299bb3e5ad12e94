"""Batch norms stay beside the products they follow, and take what PEFT trained of either."""

import copy

import numpy as np
import pytest
import torch
from peft_cases import Case, inputs, logits, make, make_case
from safetensors.torch import load_file, save_file
from torch import nn

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters, export_torch_module
from converters.onnx.slots.inserting import SlotOptions
from loraport.bundle.manifest import read_manifest
from loraport.errors import LoraportError
from loraport.parity import Sample, verify_bundle
from loraport.parity.changes import changes_of
from loraport.parity.reference import adapted
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
    runtime, feeds = Runtime(resnet_bundle), {"image": image.numpy()}
    for name, expected in ((None, base), ("a", adapted)):
        (got,) = runtime.run(feeds, name).values()
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)
    assert (adapted - base).abs().max() > 0.1
    report = verify_bundle(resnet_bundle, resnet, {"a": adapter}, samples=[Sample(feeds, feeds)])
    assert report.passed, [check for check in report.checks if not check.passed]


@pytest.fixture(scope="module")
def trained_norms(tmp_path_factory):
    directory = tmp_path_factory.mktemp("norms")
    made, out = make("batch_norms", directory / "a"), directory / "bundle"
    slots = SlotOptions(("lora", "conv"), replace=("norm", "seen"))
    export_torch_module(made.base, {"input_ids": inputs()}, out, slots=slots)
    add_adapters(out, {"a": read_adapter(made.path)})
    return made, out, {"input_ids": inputs().numpy()}


def test_normalizations_that_were_trained_are_replaced_with_their_statistics(trained_norms):
    made, out, feeds = trained_norms
    leaves = ("weight", "bias", "running_mean", "running_var")
    replaced = {slot.parameter: slot.input for slot in read_manifest(out).slots.replacements}
    assert replaced.keys() == {f"{path}.{leaf}" for path in ("norm", "seen") for leaf in leaves}
    runtime = Runtime(out)
    expected = {None: logits(made.base), "a": logits(made.peft_model)}
    for name, wanted in expected.items():
        (got,) = runtime.run(feeds, name).values()
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert (expected["a"] - expected[None]).abs().max() > 0.1
    adapters, samples = {"a": read_adapter(made.path)}, [Sample(feeds, feeds)]
    report = verify_bundle(out, made.base, adapters, samples=samples)
    assert report.passed, [check for check in report.checks if not check.passed]
    # The control: without its own statistics the adapter is another one.
    file = out / "adapters" / "a.safetensors"
    kept = file.read_bytes()
    tensors = load_file(file)
    tensors[replaced["seen.running_var"]][0] *= 2
    save_file(tensors, file)
    report = verify_bundle(out, made.base, adapters, samples=samples)
    file.write_bytes(kept)
    assert "seen.running_var: another value" in " ".join(check.detail for check in report.checks)


def test_statistics_are_blended_as_all_whole_parameters_are(trained_norms):
    made, out, feeds = trained_norms
    runtime, parts = Runtime(out), [(read_adapter(made.path), 0.5)]
    (got,) = runtime.run(feeds, {"a": 0.5}).values()
    with adapted(made.base, changes_of(parts, made.base)):
        wanted = logits(made.base)
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    with pytest.raises(LoraportError, match=r"norm\.running_var: expected a variance of zero or"):
        runtime.run(feeds, {"a": -3.0})
