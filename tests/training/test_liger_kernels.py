"""``--liger-kernel``: what it switches on, and sentences where it cannot.

Its numbers are tested where there is a GPU.
"""

import sys
import types
from types import SimpleNamespace

import pytest
import torch

from loraport.errors import LoraportError
from loraport.training.kernels.liger_kernels import use_liger_kernels

CUDA = torch.device("cuda")
LLAMA = SimpleNamespace(config=SimpleNamespace(model_type="llama"))


@pytest.fixture
def package(monkeypatch):
    """A package that notes what it is asked for."""
    asked = []

    def apply(rope=True, rms_norm=False, cross_entropy=True, model=None):
        asked.append((rope, rms_norm, cross_entropy, model))

    module = types.ModuleType("liger_kernel.transformers.monkey_patch")
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["liger_kernel.transformers"].monkey_patch = module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def test_all_kernels_but_the_loss(package):
    use_liger_kernels(LLAMA, CUDA)
    assert package == [(True, True, False, LLAMA)]


def test_a_model_it_does_not_know(package):
    other = SimpleNamespace(config=SimpleNamespace(model_type="mamba"))
    with pytest.raises(LoraportError, match="expected one of llama, got a model of type mamba"):
        use_liger_kernels(other, CUDA)
    assert not package


def test_without_a_gpu(package):
    with pytest.raises(LoraportError, match="--liger-kernel: expected a CUDA GPU, got cpu"):
        use_liger_kernels(LLAMA, torch.device("cpu"))
    assert not package


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    with pytest.raises(LoraportError, match=r"pip install 'loraport\[kernels\]'"):
        use_liger_kernels(LLAMA, CUDA)
