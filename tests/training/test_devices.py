"""Which of attention's kernels training uses."""

import contextlib

import torch
from torch.backends import cuda

from loraport.training.devices import Placement


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
