"""Linear layers that take the memory of bitsandbytes' quantized ones, and have no numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from loraport.training.losses.output_head import output_head

_BLOCK = 64  # weights a scale


def without_numbers(model: nn.Module, kind: str, dtype: torch.dtype) -> None:
    """Put stand-ins in the place of the linear layers that `quantize_linears` would quantize.

    Args:
        model: On the meta device, without LoRA layers; changed in place.
        kind: ``"nf4"`` or ``"int8"``.
        dtype: What weights are dequantized to.
    """
    kept = output_head(model)
    for module in model.modules():
        if type(module) is nn.Linear and module is not kept:
            module.__class__ = _Nf4Linear if kind == "nf4" else _Int8Linear
            module.dequantized = dtype  # type: ignore[assignment]


class _Nf4Linear(nn.Linear):
    dequantized: torch.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Nf4Product.apply(x, self.weight, self.dequantized)  # type: ignore[no-untyped-call]
        return y


class _Int8Linear(nn.Linear):
    dequantized: torch.dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Int8Product.apply(x, self.weight)  # type: ignore[no-untyped-call]
        return y


class _Nf4Product(torch.autograd.Function):
    """Scales, then the whole weight, are dequantized for each product and not kept."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype
    ) -> torch.Tensor:
        ctx.weight, ctx.dtype = weight, dtype
        scales, whole = _dequantized(weight, x.dtype)
        del scales
        return x @ whole.T

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        scales, whole = _dequantized(ctx.weight, ctx.dtype)
        del scales
        return gradient @ whole.to(gradient.dtype), None, None


def _dequantized(weight: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    scales = weight.new_empty(-(-weight.numel() // _BLOCK), dtype=torch.float32)
    return scales, torch.empty_like(weight, dtype=dtype)


class _Int8Product(torch.autograd.Function):
    """The input is rounded to 8 bits by way of 16, and the product is summed in 32."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.kept, ctx.weight = x, weight
        half = x.to(torch.float16)
        rounded = torch.empty_like(half, dtype=torch.int8)
        del half
        shape = (*x.shape[:-1], weight.shape[0])
        sums = x.new_empty(shape, dtype=torch.int32)
        y = torch.empty_like(sums, dtype=x.dtype)
        del rounded, sums
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = gradients
        whole = torch.empty_like(ctx.weight, dtype=ctx.kept.dtype)
        return gradient.to(whole.dtype) @ whole, None
