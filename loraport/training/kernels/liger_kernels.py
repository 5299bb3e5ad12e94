"""``--liger-kernel``: norms, rotations and gates by liger-kernel's fused kernels, an extra.

Liger Kernel (Hsu et al. 2024, arXiv:2410.10989) computes in one kernel what a model writes as half
a dozen operations, and keeps less for the backward pass. The loss stays ours.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from loraport.errors import LoraportError

_KERNELS = {
    "rope": True,
    "rms_norm": True,
    "layer_norm": True,
    "swiglu": True,
    "geglu": True,
    "cross_entropy": False,
    "fused_linear_cross_entropy": False,
}


def liger_function(kind: str, device: torch.device) -> Callable[..., None]:
    """Return what puts the kernels into a model.

    Args:
        kind: The model's ``model_type``.
        device: Where it computes.

    Raises:
        LoraportError: If liger-kernel is not installed or knows no such model, or there is no
            GPU.
    """
    if device.type != "cuda":
        raise LoraportError(
            f"--liger-kernel: expected a CUDA GPU, got {device}; leave out --liger-kernel"
        )
    try:
        from liger_kernel.transformers import monkey_patch
    except ImportError as error:
        raise LoraportError(
            f"--liger-kernel: expected the package liger-kernel, got: {error}; "
            "pip install 'loraport[kernels]'"
        ) from error
    known: dict[str, Callable[..., None]] = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    if kind not in known:
        raise LoraportError(
            f"--liger-kernel: expected one of {', '.join(sorted(known))}, got a model of type "
            f"{kind}; leave out --liger-kernel"
        )
    return known[kind]


@contextlib.contextmanager
def liger_kernels(model: Any, device: torch.device) -> Iterator[None]:
    """Let a model compute with them.

    The package also changes functions that all models of a kind share, for good: other models of
    this process would compute with a GPU's kernels on the CPU. Here those are put back.

    Args:
        model: A transformers language model, without LoRA layers; its own modules stay changed.
        device: Where it computes.

    Raises:
        LoraportError: See `liger_function`.
    """
    apply = liger_function(model.config.model_type, device)
    taken = inspect.signature(apply).parameters
    shared = [sys.modules[name] for name in {type(part).__module__ for part in model.modules()}]
    before = [dict(vars(module)) for module in shared]
    try:
        apply(model=model, **{name: on for name, on in _KERNELS.items() if name in taken})
        yield
    finally:
        for module, names in zip(shared, before, strict=True):
            vars(module).update(names)
