"""LoRA layers for each kind of module that can have one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from loraport.adapter import ModuleKind
from loraport.base.own_outputs import gives_outputs
from loraport.errors import LoraportError
from loraport.training.lora.lora_function import add_low_rank, lora_linear, product_dtype
from loraport.training.lora.lora_layer import LoraLayer


class LoraLinear(LoraLayer):
    """LoRA beside ``nn.Linear``."""

    @staticmethod
    def shapes(base_layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return ``[r, in]`` and ``[out, r]``."""
        layer = cast(nn.Linear, base_layer)
        return (rank, layer.in_features), (layer.out_features, rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the adapted output; unless inputs are dropped, the update goes into the base's."""
        modules = self._modules
        if self.training and isinstance(modules["lora_dropout"], nn.Dropout):
            return super().forward(x)
        layer = modules["base_layer"]
        if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
            base = self.base_layer(x)  # quantized, or watched by someone
            adapted = add_low_rank(base, x, *self._operands(base.dtype))
        else:
            weight, bias = layer._parameters["weight"], layer._parameters["bias"]
            assert weight is not None
            operands = self._operands(product_dtype(x.device.type, weight.dtype))
            adapted = lora_linear(x, weight, bias, *operands)
        return self.refined(adapted)

    def _operands(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return A, B and what their product is scaled by, for products in a dtype."""
        # A compiler fuses the rounding, and would compile anew for tensors that come and go.
        if self.rounded and self.rounded[0].dtype is dtype and not torch.compiler.is_compiling():
            return *self.rounded, 1.0
        return *self.matrices(), self.scaling

    def to_round(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Return A, B and the scaling, if they are multiplied as they are; else ``None``."""
        if self.initial_A is not None or isinstance(self.lora_dropout, nn.Dropout):
            return None  # put together first, or given another input
        return self.lora_A, self.lora_B, self.scaling

    def low_rank(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``scaling * B (A dropout(x))``."""
        x = self.dropped(x)  # [..., in]
        a, b = self.matrices()
        # The scaling goes on the narrow side: rank numbers a token instead of `out`.
        hidden = F.linear(x, a) * self.scaling  # [..., r]
        return F.linear(hidden, b)  # [..., out]


class LoraTransposedLinear(LoraLinear):
    """LoRA beside transformers' ``Conv1D``, whose weight is stored ``[in, out]``."""

    fan_in_fan_out = True

    @staticmethod
    def shapes(base_layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return ``[r, in]`` and ``[out, r]``."""
        inputs, outputs = cast(torch.Tensor, base_layer.weight).shape
        return (rank, inputs), (outputs, rank)


class LoraEmbedding(LoraLayer):
    """LoRA beside ``nn.Embedding``; its input is discrete, so nothing is dropped."""

    kind = ModuleKind.EMBEDDING

    @staticmethod
    def shapes(base_layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return ``[r, vocab]`` and ``[dim, r]``."""
        layer = cast(nn.Embedding, base_layer)
        return (rank, layer.num_embeddings), (layer.embedding_dim, rank)

    def fan_in(self) -> int:
        """Return 1: the input is one-hot, a row of ``A`` sums over a single number."""
        return 1

    def low_rank(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``scaling * B A[:, x]``, times the scale that some embeddings apply."""
        layer = cast(nn.Embedding, self.base_layer)
        a, b = self.matrices()
        rows = F.embedding(  # [..., r]
            x,
            a.T,
            padding_idx=layer.padding_idx,
            scale_grad_by_freq=layer.scale_grad_by_freq,
        )
        update = F.linear(rows * self.scaling, b)  # [..., dim]
        scale = getattr(layer, "embed_scale", None)
        return update if scale is None else update * scale


class LoraConv(LoraLayer):
    """LoRA beside ``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``; ``B`` is 1×1.

    ``A`` has the base's kernel, stride, padding, padding mode and dilation, so the layer equals one
    convolution with the merged kernel (where there is one group).
    """

    kind = ModuleKind.CONV

    @staticmethod
    def shapes(base_layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return ``[r, in, *kernel]`` and ``[out, r / groups, 1, ...]``.

        Raises:
            LoraportError: If the rank is no multiple of the groups.
        """
        layer = cast(nn.Conv2d, base_layer)
        ones = (1,) * len(layer.kernel_size)
        if rank % layer.groups:
            raise LoraportError(
                f"a convolution with {layer.groups} groups: expected a rank that is a multiple "
                f"of them, got {rank}"
            )
        shape_a = (rank, layer.in_channels, *layer.kernel_size)
        return shape_a, (layer.out_channels, rank // layer.groups, *ones)

    def low_rank(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``scaling * B * (A * dropout(x))``, where ``*`` convolves."""
        x = self.dropped(x)  # [batch, in, *size]
        layer = cast(nn.Conv2d, self.base_layer)
        dims = len(layer.kernel_size)
        convolve: Callable[..., torch.Tensor] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[dims]
        padding: Any = layer.padding
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        a, b = self.matrices()
        hidden = convolve(  # [batch, r, *size]
            x, a, stride=layer.stride, padding=padding, dilation=layer.dilation
        )
        # Only B is grouped, as in PEFT.
        return convolve(hidden * self.scaling, b, groups=layer.groups)

    def per_output(self, vector: torch.Tensor) -> torch.Tensor:
        """Shape ``[out]`` as ``[out, 1, ...]``."""
        return vector.reshape(-1, *(1,) * (self.lora_B.dim() - 2))


def lora_layer_for(module: nn.Module) -> type[LoraLayer] | str:
    """Return the LoRA layer that fits a module, or why there is none."""
    if isinstance(module, nn.Linear):
        return LoraLinear if gives_outputs(module) else f"a {type(module).__name__}"
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "an Embedding with max_norm, which rewrites its own weight"
        return LoraEmbedding
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return LoraConv
    # A model can only hold transformers' Conv1D if transformers was imported.
    transformers = sys.modules.get("transformers.pytorch_utils")
    if transformers is not None and isinstance(module, transformers.Conv1D):
        return LoraTransposedLinear
    return f"a {type(module).__name__}"
