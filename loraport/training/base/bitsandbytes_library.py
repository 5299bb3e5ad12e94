"""bitsandbytes, an extra: quantized bases and 8-bit optimizers."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from loraport.errors import LoraportError

if TYPE_CHECKING:
    import torch


def import_bitsandbytes(wanted_by: str) -> Any:
    """Return the package.

    Args:
        wanted_by: The option that needs it, as it was given.

    Raises:
        LoraportError: If it is not installed.
    """
    # It says what kernels it lacks; what it then uses instead is as right.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        import bitsandbytes
    except ImportError as error:
        raise LoraportError(
            f"{wanted_by}: expected the package bitsandbytes, got: {error}; "
            "pip install 'loraport[quantized-training]'"
        ) from error
    return bitsandbytes


def require_pageable(optimizer: str, device: torch.device) -> None:
    """Refuse a paged optimizer where there is no GPU.

    Raises:
        LoraportError: If there is none.
    """
    if optimizer == "paged-adamw-8bit" and device.type != "cuda":
        raise LoraportError(
            f"--optimizer {optimizer}: expected a CUDA GPU, whose memory is paged to the host's, "
            f"got {device}; use adamw-8bit"
        )
