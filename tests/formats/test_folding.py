"""A scale that has to go into float16 matrices costs no more than one rounding of B."""

import pytest
import torch

from converters.formats.registry import read_adapter, write_adapter
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.errors import LoraportError


def _spread(shape, size, seed):
    """Elements of both signs between size / 2 and size, so that bounds hold for each."""
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, shape, generator=generator) * 2 - 1
    return (size * signs * (torch.rand(shape, generator=generator) / 2 + 0.5)).half()


def _adapter(size_a, size_b, alpha):
    a, b = _spread((4, 7), size_a, 0), _spread((5, 4), size_b, 1)
    return Adapter({"fc": LoraModule(ModuleKind.LINEAR, a, b, alpha=alpha)})


# B times alpha / 4 would leave what float16 holds in full, below or above.
@pytest.mark.parametrize(("size_b", "alpha"), [(1e-4, 0.3), (1e-5, 1.1), (3.0, 1e5), (2e-4, -0.1)])
def test_float16_keeps_its_precision(size_b, alpha, tmp_path) -> None:
    adapter = _adapter(1e-2, size_b, alpha)
    module = adapter.modules["fc"]
    write_adapter(adapter, tmp_path / "x.onnx_adapter", "onnx")
    back = read_adapter(tmp_path / "x.onnx_adapter").modules["fc"]
    assert back.lora_B.dtype == back.lora_A.dtype == torch.float16
    assert back.scaling == 1.0
    expected = module.scaling * (module.lora_B.double() @ module.lora_A.double())
    size = abs(module.scaling) * (module.lora_B.double().abs() @ module.lora_A.double().abs())
    error = (back.lora_B.double() @ back.lora_A.double() - expected).abs()
    assert (error <= size * 2**-11).all()  # half a unit in the last place of B's elements
    alone = (module.lora_B.double() * module.scaling).half().double() @ module.lora_A.double()
    assert not ((alone - expected).abs() <= size * 2**-11).all()


def test_what_float16_holds_goes_into_b_alone(tmp_path) -> None:
    adapter = _adapter(1e-2, 0.3, 0.7)
    write_adapter(adapter, tmp_path / "x.onnx_adapter", "onnx")
    back = read_adapter(tmp_path / "x.onnx_adapter").modules["fc"]
    module = adapter.modules["fc"]
    assert torch.equal(back.lora_A, module.lora_A)
    assert torch.equal(back.lora_B, (module.lora_B.double() * module.scaling).half())


@pytest.mark.parametrize(("alpha", "what"), [(1e-3, "an underflow"), (1e20, "an overflow")])
def test_what_neither_matrix_can_take_is_refused(alpha, what, tmp_path) -> None:
    with pytest.raises(LoraportError, match=f"to fit torch.float16, got {what}; convert"):
        write_adapter(_adapter(1e-4, 1e-4, alpha), tmp_path / "x", "onnx")
    assert not (tmp_path / "x").exists()


def test_zeros_stay_zeros(tmp_path) -> None:
    adapter = _adapter(1e-2, 0.0, 1e-3)
    write_adapter(adapter, tmp_path / "x.onnx_adapter", "onnx")
    assert not read_adapter(tmp_path / "x.onnx_adapter").modules["fc"].lora_B.any()
