"""An ``.onnx_adapter`` file as named tensors, by ONNX Runtime's own reader and writer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.errors import LoraportError

if TYPE_CHECKING:
    import torch

# torch name → number of the type in ONNX; the types that ONNX Runtime computes LoRA in.
ONNX_TYPES = {"float32": 1, "float16": 10, "float64": 11, "bfloat16": 16}


def write_parameters(tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Write named tensors with ONNX Runtime's own writer."""
    import onnxruntime
    import torch

    # The values only borrow the arrays' memory: both must live until the file is written.
    arrays = []
    values = {}
    for name, tensor in tensors.items():
        cpu = tensor.detach().cpu().contiguous()  # the writer knows no strides
        bits = cpu.view(torch.uint16) if cpu.dtype is torch.bfloat16 else cpu
        arrays.append(bits.numpy())
        values[name] = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(
            arrays[-1], ONNX_TYPES[str(cpu.dtype).removeprefix("torch.")]
        )
    adapter_format = onnxruntime.AdapterFormat()
    adapter_format.set_adapter_version(1)
    adapter_format.set_model_version(1)
    adapter_format.set_parameters(values)
    adapter_format.export_adapter(str(path))


def read_parameters(path: Path) -> dict[str, torch.Tensor]:
    """Read all tensors by name.

    Raises:
        LoraportError: If it is no such file, or holds something that is no floats.
    """
    import onnxruntime
    from torch.utils.dlpack import from_dlpack

    try:
        parameters = onnxruntime.AdapterFormat.read_adapter(str(path)).get_parameters()
        tensors: dict[str, torch.Tensor] = {}
        for name, value in parameters.items():
            if value.element_type() not in ONNX_TYPES.values():
                raise LoraportError(
                    f"adapter {path}: {name}: expected one of {', '.join(ONNX_TYPES)}, "
                    f"got {value.data_type()}"
                )
            # A copy: the file is memory-mapped, and may be replaced after this.
            tensors[name] = from_dlpack(value).clone()
    except (RuntimeError, ValueError, UnicodeDecodeError, BufferError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise LoraportError(
            f"adapter {path}: expected an .onnx_adapter file, got: {reason}; fetch it again"
        ) from error
    return tensors
