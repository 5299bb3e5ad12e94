"""RMS norms by PyTorch's own kernel, where a GPU trains.

Models write ``w * x / sqrt(mean(x^2) + eps)`` (Zhang & Sennrich 2019, arXiv:1910.07467) as eight
operations, of which autograd makes another dozen and keeps two float32 copies of ``x``; in a small
model that is a quarter of what a GPU is told in a step. PyTorch has both passes as one kernel
each, which keep ``x`` and a number a token, and round the result once.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

# What models call what is added to the mean square.
_EPSILONS = ("variance_epsilon", "eps", "epsilon")
# Where PyTorch has the kernel; elsewhere it takes as many operations as the models.
_DEVICES = ("cuda",)

Norm = Callable[..., torch.Tensor]


@contextlib.contextmanager
def fused_norms(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Let a model's RMS norms be computed by one kernel, on a GPU; afterwards it is as it was.

    Norms are told by what they compute, not by name. Left alone are those of another formula
    (Gemma's ``1 + w``, which bfloat16 would round), those that someone has replaced already or that
    a compiler has, and inputs of another dtype than the weight.

    Args:
        model: Any model.
        device: Where it computes.
    """
    found = dict(_norms(model)) if device.type in _DEVICES else {}
    # Autocast has it in float32, in some versions of PyTorch; it is exact in any dtype.
    kernel = torch.autocast(device.type, enabled=False)(F.rms_norm) if found else F.rms_norm
    for module, epsilon in found.items():
        # By the instance, which goes before its class.
        vars(module)["forward"] = partial(_fused, module, module.forward, kernel, epsilon)
    try:
        yield
    finally:
        for module in found:
            del vars(module)["forward"]


def _fused(
    module: nn.Module, own: Norm, kernel: Norm, epsilon: float, *given: Any, **named: Any
) -> torch.Tensor:
    weight = module._parameters["weight"]
    assert weight is not None
    if len(given) != 1 or named or given[0].dtype is not weight.dtype:
        return own(*given, **named)  # with a gate, say
    return kernel(given[0], weight.shape, weight, epsilon)


def _norms(model: nn.Module) -> Iterator[tuple[nn.Module, float]]:
    """Yield the modules that are RMS norms, and what they add to the mean square."""
    # There the compiler fuses what the model writes.
    whole = [module for module in model.modules() if module._compiled_call_impl is not None]
    compiled = {module for layer in whole for module in layer.modules()}
    for module in model.modules():
        weight = module._parameters.get("weight")
        epsilon = next((v for name in _EPSILONS if (v := vars(module).get(name))), None)
        if weight is None or weight.dim() != 1 or not isinstance(epsilon, float):
            continue
        parts = len(module._parameters) + len(module._buffers) + len(module._modules)
        mine = parts == 1 and "forward" not in vars(module) and module not in compiled
        if mine and _is_one(module, epsilon):
            yield module, epsilon


@torch.no_grad()
def _is_one(module: nn.Module, epsilon: float) -> bool:
    """Tell whether a module computes an RMS norm: tried with a weight of its own, on the CPU."""
    numbers = torch.Generator().manual_seed(0)
    weight = module._parameters["weight"]
    assert weight is not None
    drawn = torch.rand(weight.shape, generator=numbers) + 0.5
    twin = copy.copy(module)
    vars(twin)["_parameters"] = {"weight": nn.Parameter(drawn)}
    # Also so small that what is added to the mean square is as large as it.
    x = torch.randn((3, *weight.shape), generator=numbers)
    x *= torch.tensor([1.0, 100.0, epsilon**0.5]).unsqueeze(1)
    try:
        got = type(twin).forward(twin, x)
    except Exception:  # whatever this is, it is no norm
        return False
    expected = x.double()
    expected = expected * (expected.square().mean(-1, keepdim=True) + epsilon).rsqrt() * drawn
    return isinstance(got, torch.Tensor) and torch.allclose(got.double(), expected, 1e-5, 1e-6)
