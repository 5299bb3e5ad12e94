"""Arrays as ONNX Runtime's values, and back.

Numpy has no bfloat16 of its own, and ONNX Runtime takes and gives none as arrays: here such arrays
have the dtype ``ml_dtypes.bfloat16``.
"""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from loraport.errors import LoraportError

if TYPE_CHECKING:
    import torch

# What ONNX Runtime calls the types that hidden states have, and numpy's.
FLOATS: dict[str, Any] = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(bfloat16)": ml_dtypes.bfloat16,
    "tensor(double)": np.float64,
}
_BFLOAT16 = 16  # onnx.TensorProto.BFLOAT16


def holds_numbers(kind: str) -> bool:
    """Tell whether ONNX Runtime's name of a type is that of an array of numbers or truth values.

    Sequences, maps and texts are none: arrays cannot be bound to them.
    """
    return "tensor(" in kind and not any(other in kind for other in ("seq(", "map(", "string"))


def as_value(array: np.ndarray, device: str) -> tuple[Any, np.ndarray]:
    """Return an array as ``OrtValue`` on a device, and the array, which must live as long.

    Args:
        array: Any numbers, ``ml_dtypes.bfloat16`` among them.
        device: ``"cpu"`` or ``"cuda"``.
    """
    from onnxruntime import OrtValue

    array = np.ascontiguousarray(array).reshape(array.shape)  # 0 dimensions would become one
    if array.dtype != ml_dtypes.bfloat16:
        return OrtValue.ortvalue_from_numpy(array, device, 0), array
    bits = array.view(np.int16)
    if device == "cpu":
        return OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _BFLOAT16), array
    value = OrtValue.ortvalue_from_shape_and_type(list(array.shape), _BFLOAT16, device, 0)
    if array.size:
        value.update_inplace(bits)
    return value, array


def as_numpy(value: Any) -> np.ndarray:
    """Return an ``OrtValue``'s content as an array of its own.

    Raises:
        LoraportError: If it is bfloat16 and on another device than the CPU.
    """
    if value.element_type() != _BFLOAT16:
        return np.array(value.numpy())
    if value.device_name() != "cpu":
        raise LoraportError(
            f"a bfloat16 value: expected it on the CPU, got {value.device_name()}; let the lane "
            "give it as an array"
        )
    shape = tuple(value.shape())
    size = math.prod(shape)
    if not size:
        return np.empty(shape, ml_dtypes.bfloat16)
    bits = np.ctypeslib.as_array((ctypes.c_int16 * size).from_address(value.data_ptr()))
    array: np.ndarray = bits.copy().view(ml_dtypes.bfloat16).reshape(shape)
    return array


def numpy_of(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor of the CPU as an array over the same memory where that is contiguous."""
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype != torch.bfloat16:
        return tensor.numpy()
    array: np.ndarray = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return array


def torch_of(array: np.ndarray) -> torch.Tensor:
    """Return an array as a tensor over the same memory, `numpy_of` the other way round."""
    import torch

    if array.dtype != ml_dtypes.bfloat16:
        return torch.from_numpy(array)
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
