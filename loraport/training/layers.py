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
from loraport.training.dora import row_norms, row_squares
from loraport.training.lora_function import add_low_rank, lora_linear
from loraport.training.principal import principal_matrices

Init = Literal["kaiming", "gaussian", "pissa", "olora"]


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
    # DoRA's magnitudes [out] while they are trained, and the squares of the base's row norms.
    magnitude: nn.Parameter | None
    squares: torch.Tensor | None
    # Matrices whose product is taken off that of A and B (PiSSA, OLoRA).
    initial_A: torch.Tensor | None  # noqa: N815  the field's name for it
    initial_B: torch.Tensor | None  # noqa: N815  the field's name for it
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
        self.register_parameter("magnitude", None)
        for name in ("squares", "initial_A", "initial_B", "gain", "extra_bias"):
            self.register_buffer(name, None, persistent=False)

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

    def matrices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return A and B as they are multiplied: beside those whose product is subtracted."""
        if self.initial_A is None or self.initial_B is None:
            return self.lora_A, self.lora_B
        both_a = torch.cat([self.lora_A, self.initial_A])
        return both_a, torch.cat([self.lora_B, -self.initial_B], dim=1)

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
        return self.refined(base + self.low_rank(x)).to(base.dtype)

    def refined(self, adapted: torch.Tensor) -> torch.Tensor:
        """Apply what a variant has beyond low rank.

        Args:
            adapted: The output of base and low-rank update.
        """
        gain = self.present_gain()
        if gain is not None:
            bias = getattr(self.base_layer, "bias", None)
            plain = adapted if bias is None else adapted - self.per_output(bias).to(adapted.dtype)
            # The gain is near 1: a narrow dtype holds its difference to that better.
            adapted = adapted + self.per_output(gain - 1).to(adapted.dtype) * plain
        if self.extra_bias is not None:
            adapted = adapted + self.per_output(self.extra_bias)
        return adapted

    def present_gain(self) -> torch.Tensor | None:
        """Return the factor on each output, ``[out]``; ``None`` for plain LoRA."""
        if self.magnitude is None or self.squares is None:
            return self.gain
        return self.magnitude / row_norms(self, self.squares)

    @torch.no_grad()
    def reset(self, init: Init, generator: torch.Generator, *, use_dora: bool = False) -> None:
        """Draw ``A`` anew and set ``B`` to zero, so that the layer equals its base.

        Kaiming-uniform with ``a = sqrt(5)`` is ``U(-1/sqrt(fan_in), 1/sqrt(fan_in))``; the
        Gaussian has standard deviation ``1 / rank``. For the others see `principal`.

        Args:
            init: The distribution, or what of the base's weight to begin with.
            generator: On the CPU, so that a seed means the same on every device.
            use_dora: Train magnitudes too, which begin as the norms of the base's rows.

        Raises:
            LoraportError: If the base does not allow it.
        """
        drawn = torch.empty(self.lora_A.shape, dtype=torch.float32)
        if init == "gaussian":
            drawn.normal_(std=1 / self.rank, generator=generator)
        else:
            bound = 1 / math.sqrt(self.fan_in())
            drawn.uniform_(-bound, bound, generator=generator)
        self.lora_A.copy_(drawn)
        self.lora_B.zero_()
        if init in ("pissa", "olora"):
            self.initial_A, self.initial_B = principal_matrices(
                self, init, generator.initial_seed()
            )
            self.lora_A.copy_(self.initial_A)
            self.lora_B.copy_(self.initial_B)
        if use_dora:
            self.squares = row_squares(self)
            self.magnitude = nn.Parameter(self.squares.sqrt())


class LoraLinear(LoraLayer):
    """LoRA beside ``nn.Linear``."""

    @staticmethod
    def shapes(base_layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return ``[r, in]`` and ``[out, r]``."""
        layer = cast(nn.Linear, base_layer)
        return (rank, layer.in_features), (layer.out_features, rank)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the adapted output; unless inputs are dropped, with the update in one node."""
        if self.training and isinstance(self.lora_dropout, nn.Dropout):
            return super().forward(x)
        weight, bias = self._frozen_weight()
        a, b = self.matrices()
        if weight is None:
            adapted = add_low_rank(self.base_layer(x), x, a, b, self.scaling)
        else:
            adapted = lora_linear(x, weight, bias, a, b, self.scaling)
        return self.refined(adapted).to(adapted.dtype)

    def _frozen_weight(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return weight ``[out, in]`` and bias, where ``x W^T`` is all that the base does."""
        layer = self.base_layer
        if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
            return None, None  # quantized, or watched by someone
        return layer.weight, layer.bias

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
