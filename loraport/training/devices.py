"""Where and in which precision a run computes."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from loraport.errors import LoraportError


@dataclass(frozen=True)
class Placement:
    """A device and the dtype that matrix products use on it.

    Attributes:
        device: Where the model and the batches go.
        dtype: bfloat16 for autocast, float32 for none.
    """

    device: torch.device
    dtype: torch.dtype

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context the forward pass runs in."""
        if self.dtype is torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def attention(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context that chooses attention's kernels.

        On a GPU not cuDNN's: it plans anew for every length, tens of milliseconds a step where
        batches differ.
        """
        if self.device.type != "cuda":
            return contextlib.nullcontext()
        from torch.nn.attention import SDPBackend, sdpa_kernel

        return sdpa_kernel(
            [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        )


def choose_placement(device: str, dtype: str) -> Placement:
    """Resolve ``"auto"``: CUDA where there is one, bfloat16 where CUDA hardware has it.

    Args:
        device: ``"auto"`` or a torch device.
        dtype: ``"auto"``, ``"float32"`` or ``"bfloat16"``.

    Raises:
        LoraportError: If the device is not there.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).splitlines()[0]
        if isinstance(error, NotImplementedError):  # whose text lists all that torch could have
            reason = "one that this build of torch cannot use"
        raise _no_device(device, reason) from error
    if chosen.type == "meta":
        raise _no_device(device, "one that holds shapes without numbers")
    if dtype == "auto":
        has_bf16 = chosen.type == "cuda" and torch.cuda.is_bf16_supported(False)
        dtype = "bfloat16" if has_bf16 else "float32"
    return Placement(chosen, torch.bfloat16 if dtype == "bfloat16" else torch.float32)


def _no_device(device: str, reason: str) -> LoraportError:
    return LoraportError(
        f"device {device!r}: expected a device of this machine, got: {reason}; try cpu"
    )


def to_device(batch: Any, device: torch.device) -> Any:
    """Move what can move: tensors, objects with ``to``, and those inside lists and mappings."""
    if callable(getattr(batch, "to", None)):
        return batch.to(device)
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(item, device) for item in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(item, device) for item in batch)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch
