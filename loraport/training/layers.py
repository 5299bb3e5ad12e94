"""LoRA layers: a frozen module of the base with two trainable matrices beside it.

``y = W x + scaling * B (A dropout(x))`` (Hu et al. 2021, arXiv:2106.09685). The matrices have
the shapes that `loraport.adapter.LoraModule` states and are kept in float32 at least, whatever
the dtype of the base.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import nn

from loraport.adapter import ModuleKind
from loraport.errors import LoraportError
from loraport.scaling import lora_scaling
from loraport.training.lora_function import add_low_rank, lora_linear


class LoraLayer(nn.Module):
    """A base module and its low-rank update; subclasses say how ``B (A x)`` is computed.

    Attributes the layer lacks (``weight``, ``in_features``, ...) are the base module's, since
    some models look at them.

    Args:
        base_layer: The module adapted; it is kept as it is.
        rank: Rows of ``A``.
        alpha: ``lora_alpha``.
        use_rslora: Rank-stabilised scaling.
        dropout: Probability with which inputs of ``A`` are dropped while training.
    """

    kind: ModuleKind = ModuleKind.LINEAR
    fan_in_fan_out: bool = False
    # What the canonical form has beyond low rank; set when an adapter with such parts is loaded.
    gain: torch.Tensor | None
    extra_bias: torch.Tensor | None

    def __init__(
        self,
        base_layer: nn.Module,
        rank: int,
        alpha: float,
        *,
        use_rslora: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.rank = rank
        self.alpha = alpha
        self.use_rslora = use_rslora
        self.scaling = lora_scaling(rank, alpha, use_rslora=use_rslora)
        self.lora_dropout = nn.Dropout(dropout) if dropout > 0 else nn.Identity()
        shape_a, shape_b = self.shapes(base_layer, rank)
        weight = cast(torch.Tensor, base_layer.weight)
        dtype = torch.float32
        if weight.dtype.is_floating_point:
            dtype = torch.promote_types(weight.dtype, torch.float32)
        self.lora_A = nn.Parameter(torch.zeros(shape_a, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(shape_b, dtype=dtype, device=weight.device))
        self.register_buffer("gain", None, persistent=False)
        self.register_buffer("extra_bias", None, persistent=False)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    @staticmethod
    def shapes(base_layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes of ``lora_A`` and ``lora_B`` for a base module."""
        raise NotImplementedError

    def low_rank(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``scaling * B (A dropout(x))``, of the output's shape."""
        raise NotImplementedError

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``dropout(x)`` in the dtype of ``A``, or as it is where autocast will choose."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        dropped: torch.Tensor = self.lora_dropout(x)
        return dropped

    def per_output(self, vector: torch.Tensor) -> torch.Tensor:
        """Shape a vector ``[out]`` so that it broadcasts over the output."""
        return vector

    def fan_in(self) -> int:
        """Return how many inputs one row of ``A`` sums over."""
        return self.lora_A[0].numel()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the adapted output, in the base's dtype.

        Args:
            x: The base module's input, of any shape it takes.
        """
        base: torch.Tensor = self.base_layer(x)
        adapted = base + self.low_rank(x)
        if self.gain is not None:
            bias = getattr(self.base_layer, "bias", None)
            shift = 0 if bias is None else self.per_output(bias)
            adapted = self.per_output(self.gain) * (adapted - shift) + shift
        if self.extra_bias is not None:
            adapted = adapted + self.per_output(self.extra_bias)
        return adapted.to(base.dtype)

    @torch.no_grad()
    def reset(self, init: Literal["kaiming", "gaussian"], generator: torch.Generator) -> None:
        """Draw ``A`` anew and set ``B`` to zero, so that the layer equals its base.

        Kaiming-uniform with ``a = sqrt(5)`` is ``U(-1/sqrt(fan_in), 1/sqrt(fan_in))``; the
        Gaussian has standard deviation ``1 / rank``.

        Args:
            init: The distribution.
            generator: On the CPU, so that a seed means the same on every device.
        """
        drawn = torch.empty(self.lora_A.shape, dtype=torch.float32)
        if init == "gaussian":
            drawn.normal_(std=1 / self.rank, generator=generator)
        else:
            bound = 1 / math.sqrt(self.fan_in())
            drawn.uniform_(-bound, bound, generator=generator)
        self.lora_A.copy_(drawn)
        self.lora_B.zero_()


class LoraLinear(LoraLayer):
    """LoRA beside ``nn.Linear``."""

    @staticmethod
    def shapes(base_layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return ``[r, in]`` and ``[out, r]``."""
        layer = cast(nn.Linear, base_layer)
        return (rank, layer.in_features), (layer.out_features, rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the adapted output; where nothing but A and B is beside the base, in one node."""
        dropping = self.training and isinstance(self.lora_dropout, nn.Dropout)
        if dropping or self.gain is not None or self.extra_bias is not None:
            return super().forward(x)
        weight, bias = self._frozen_weight()
        if weight is None:
            base = self.base_layer(x)
            return add_low_rank(base, x, self.lora_A, self.lora_B, self.scaling)
        return lora_linear(x, weight, bias, self.lora_A, self.lora_B, self.scaling)

    def _frozen_weight(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return weight ``[out, in]`` and bias, where ``x W^T`` is all that the base does."""
        layer = self.base_layer
        if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
            return None, None  # quantized, or watched by someone
        return layer.weight, layer.bias

    def low_rank(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``scaling * B (A dropout(x))``."""
        x = self.dropped(x)  # [..., in]
        # The scaling goes on the narrow side: rank numbers a token instead of `out`.
        hidden = F.linear(x, self.lora_A) * self.scaling  # [..., r]
        return F.linear(hidden, self.lora_B)  # [..., out]


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
        rows = F.embedding(  # [..., r]
            x,
            self.lora_A.T,
            padding_idx=layer.padding_idx,
            scale_grad_by_freq=layer.scale_grad_by_freq,
        )
        update = F.linear(rows * self.scaling, self.lora_B)  # [..., dim]
        scale = getattr(layer, "embed_scale", None)
        return update if scale is None else update * scale


class LoraConv(LoraLayer):
    """LoRA beside ``nn.Conv1d`` and ``nn.Conv2d``: ``A`` has the base's kernel, ``B`` is 1×1.

    ``A`` has the base's stride, padding, padding mode and dilation, so the layer equals one
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
        convolve: Callable[..., torch.Tensor] = F.conv1d if self.lora_B.dim() == 3 else F.conv2d
        padding: Any = layer.padding
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        hidden = convolve(  # [batch, r, *size]
            x, self.lora_A, stride=layer.stride, padding=padding, dilation=layer.dilation
        )
        # Only B is grouped, as in PEFT.
        return convolve(hidden * self.scaling, self.lora_B, groups=layer.groups)

    def per_output(self, vector: torch.Tensor) -> torch.Tensor:
        """Shape ``[out]`` as ``[out, 1, ...]``."""
        return vector.reshape(-1, *(1,) * (self.lora_B.dim() - 2))


def lora_layer_for(module: nn.Module) -> type[LoraLayer] | str:
    """Return the LoRA layer that fits a module, or why there is none."""
    if isinstance(module, nn.Linear):
        return LoraLinear
    if isinstance(module, nn.Embedding):
        if module.max_norm is not None:
            return "an Embedding with max_norm, which rewrites its own weight"
        return LoraEmbedding
    if isinstance(module, nn.Conv1d | nn.Conv2d):
        return LoraConv
    # A model can only hold transformers' Conv1D if transformers was imported.
    transformers = sys.modules.get("transformers.pytorch_utils")
    if transformers is not None and isinstance(module, transformers.Conv1D):
        return LoraTransposedLinear
    return f"a {type(module).__name__}"
