"""Read and write GGUF files of float tensors with the ``gguf`` package."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraport.errors import LoraportError

if TYPE_CHECKING:
    import torch


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Return a file's fields and tensors (float32, float16 or bfloat16), by name.

    Raises:
        LoraportError: If the file is damaged or holds quantized tensors.
    """
    import numpy as np
    import torch

    from loraport.base.gguf.reader import bounded_reader

    kinds = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    try:
        reader = bounded_reader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {}
        for stored in reader.tensors:
            dtype = kinds.get(stored.tensor_type.name)
            if dtype is None:
                raise LoraportError(
                    f"{path}: {stored.name}: expected one of {', '.join(kinds)}, "
                    f"got {stored.tensor_type.name}; an adapter has float tensors"
                )
            shape = [int(size) for size in reversed(stored.shape)]
            raw = np.array(stored.data, order="C").view(np.uint8).reshape(-1)
            tensors[str(stored.name)] = torch.from_numpy(raw).view(dtype).reshape(shape)
    except LoraportError:
        raise
    # The reader trusts its input, so damage surfaces as whatever it trips over.
    except Exception as error:
        raise LoraportError(
            f"{path}: expected a GGUF file, got damage: {error}; fetch it again"
        ) from error
    return fields, tensors


def write_gguf(
    path: Path, architecture: str, fields: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Write a file.

    Args:
        path: Where to.
        architecture: ``general.architecture``.
        fields: Strings and floats (stored as float32) by key.
        tensors: Contiguous float32, float16 or bfloat16 tensors on the CPU, by name.
    """
    import gguf
    import torch

    kinds = {
        torch.float32: gguf.GGMLQuantizationType.F32,
        torch.float16: gguf.GGMLQuantizationType.F16,
        torch.bfloat16: gguf.GGMLQuantizationType.BF16,
    }
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        if isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_float32(key, value)
    for name, tensor in tensors.items():
        # Flat first: a column's strides are odd, contiguous or not.
        raw = tensor.flatten().view(torch.uint8).numpy().reshape(*tensor.shape[:-1], -1)
        writer.add_tensor(name, raw, raw_dtype=kinds[tensor.dtype])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
