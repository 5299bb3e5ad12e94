"""Which of attention's kernels training uses."""

import contextlib

import pytest
import torch
from torch.backends import cuda

from loraport.errors import LoraportError
from loraport.training.devices import Placement, choose_placement


def enabled():
    return (cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled())


def test_on_a_gpu_attention_is_not_cudnns_while_training():
    before = enabled()
    assert before == (True, True, True)
    with Placement(torch.device("cuda"), torch.bfloat16).attention():
        assert enabled() == (False, True, True)
        assert cuda.math_sdp_enabled()
    assert enabled() == before


def test_elsewhere_torch_chooses():
    context = Placement(torch.device("cpu"), torch.float32).attention()
    assert isinstance(context, contextlib.nullcontext)


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        ("meta", "one that holds shapes without numbers"),
        ("vulkan", "one that this build of torch cannot use"),
        ("hpu", "No module named 'torch.hpu'"),
        ("abacus", "Expected one of cpu, .*: abacus"),
    ],
)
def test_what_cannot_compute_is_refused_in_one_line(device, reason):
    """Control: the CPU."""
    expected = f"device '{device}': expected a device of this machine, got: {reason}; try cpu"
    with pytest.raises(LoraportError, match=f"^{expected}$"):
        choose_placement(device, "float32")
    assert choose_placement("cpu", "float32") == Placement(torch.device("cpu"), torch.float32)
