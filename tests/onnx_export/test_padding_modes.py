"""Convolutions that pad with their own values: slots compute what a merge makes of the kernel.

PEFT 0.21 pads the input of ``A`` with zeros whatever the base does, so its own model changes when
the adapter is merged; the merged one, ``W + B A``, is what LoRA means and what loraport computes.
"""

import copy

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from converters.formats.registry import read_adapter
from converters.onnx import add_adapters, export_torch_module
from converters.onnx.slots.inserting import SlotOptions
from loraport.parity import Sample, verify_bundle
from loraport.runtime import Runtime

CLOSE = {"rtol": 1e-5, "atol": 1e-5}


class Convolution(nn.Module):
    """One of them, with a name."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv

    def forward(self, x):
        return self.conv(x)


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.Conv3d])
def test_the_change_is_padded_as_the_base_is(kind, mode, tmp_path):
    torch.manual_seed(0)
    base = Convolution(kind(4, 5, 3, padding=2, stride=2, padding_mode=mode)).eval()
    x = torch.randn(2, 4, *(9, 7, 5)[: base.conv.weight.dim() - 2])
    config = LoraConfig(target_modules=["conv"], r=3, init_lora_weights=False)
    peft_model = get_peft_model(copy.deepcopy(base), config).eval()
    peft_model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        unmerged, plain = peft_model(x).numpy(), base(x).numpy()
        merged = peft_model.merge_and_unload()(x).numpy()
    bundle, adapter = tmp_path / "bundle", read_adapter(tmp_path / "adapter")
    export_torch_module(base, {"x": x}, bundle, slots=SlotOptions(("lora", "conv")))
    add_adapters(bundle, {"a": adapter})
    (got,) = Runtime(bundle, threads=1).run({"x": x.numpy()}, "a").values()
    np.testing.assert_allclose(got, merged, **CLOSE)
    # The controls: neither the base nor zeros around the input give the same.
    assert np.abs(plain - got).max() > 0.1
    assert np.abs(unmerged - got).max() > 0.1
    sample = Sample({"x": x.numpy()}, {"x": x.numpy()})
    report = verify_bundle(bundle, base, {"a": adapter}, samples=[sample])
    assert report.passed, [check for check in report.checks if not check.passed]
