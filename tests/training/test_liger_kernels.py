"""``--liger-kernel``: what it switches on, and sentences where it cannot.

Its numbers are tested where there is a GPU.
"""

import sys
import types
from types import SimpleNamespace

import pytest
import torch

from loraport.errors import LoraportError
from loraport.training.kernels.liger_kernels import liger_kernels

CUDA = torch.device("cuda")


class Model(torch.nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.config = SimpleNamespace(model_type=kind)


LLAMA = Model("llama")


def rotate(x):
    return x


@pytest.fixture
def package(monkeypatch):
    """A package that notes what it is asked for."""
    asked = []

    def apply(rope=True, rms_norm=False, cross_entropy=True, model=None):
        asked.append((rope, rms_norm, cross_entropy, model))
        sys.modules[Model.__module__].rotate = None  # as it does with functions of all models

    module = types.ModuleType("liger_kernel.transformers.monkey_patch")
    module.MODEL_TYPE_TO_APPLY_LIGER_FN = {"llama": apply}
    for name in ("liger_kernel", "liger_kernel.transformers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    sys.modules["liger_kernel.transformers"].monkey_patch = module
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return asked


def test_all_kernels_but_the_loss(package):
    own = rotate
    with liger_kernels(LLAMA, CUDA):
        assert package == [(True, True, False, LLAMA)]
        assert rotate is None
    assert rotate is own


def test_a_model_it_does_not_know(package):
    message = "expected one of llama, got a model of type mamba"
    with pytest.raises(LoraportError, match=message), liger_kernels(Model("mamba"), CUDA):
        pass
    assert not package


def test_without_a_gpu(package):
    message = "--liger-kernel: expected a CUDA GPU, got cpu"
    with pytest.raises(LoraportError, match=message), liger_kernels(LLAMA, torch.device("cpu")):
        pass
    assert not package


def test_without_the_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    message = r"pip install 'loraport\[kernels\]'"
    with pytest.raises(LoraportError, match=message), liger_kernels(LLAMA, CUDA):
        pass
