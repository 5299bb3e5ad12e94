"""Write a small safetensors file the same way every time."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def write_safetensors(
    tensors: Mapping[str, torch.Tensor], path: Path, metadata: Mapping[str, str]
) -> None:
    """Write tensors and metadata; equal contents give equal bytes.

    The library writes metadata in an order that changes from run to run; here it is sorted.

    Args:
        tensors: Tensors by name, any device; held in memory once more while writing.
        path: The new file.
        metadata: Free text by key.
    """
    from safetensors.torch import save

    separate: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        stored = tensor.detach().contiguous().cpu()
        # The library refuses tensors that share memory, as tied weights do.
        shared = stored.untyped_storage().data_ptr() in seen
        separate[name] = stored.clone() if shared else stored
        seen.add(stored.untyped_storage().data_ptr())
    content = save(separate, dict(metadata))
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])


def safetensors_header(
    shapes: Mapping[str, tuple[int, ...]], dtype: str, size: int, metadata: Mapping[str, str]
) -> bytes:
    """Return the header of a file of tensors of one dtype, one after the other in this order.

    Args:
        shapes: Tensor name → shape.
        dtype: The format's name of the dtype.
        size: Its bytes per element.
        metadata: Free text by key.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name, shape in shapes.items():
        end = start + math.prod(shape) * size
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors start at a multiple of 8
    return len(text).to_bytes(8, "little") + text
