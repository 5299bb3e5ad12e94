"""What all LoRA layers share: a frozen module of the base with two trainable matrices beside it.

``y = W x + scaling * B (A dropout(x))`` (Hu et al. 2021, arXiv:2106.09685). The matrices have
the shapes that `loraport.adapter.LoraModule` states and are kept in float32 at least, whatever
the dtype of the base.
"""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from torch import nn

from loraport.adapter import ModuleKind
from loraport.scaling import lora_scaling
from loraport.training.lora.base_rows import float_weight
from loraport.training.lora.dora import row_norms, row_squares
from loraport.training.lora.principal import principal_matrices

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
    # A and scaling * B in the dtype of the products, while there are `RoundedMatrices`.
    rounded: tuple[torch.Tensor, torch.Tensor] | None = None

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
        # Not as attributes, for which a module searches: this runs for every layer in every step.
        a, b = self._parameters["lora_A"], self._parameters["lora_B"]
        initial_a, initial_b = self._buffers["initial_A"], self._buffers["initial_B"]
        assert a is not None
        assert b is not None
        if initial_a is None or initial_b is None:
            return a, b
        return torch.cat([a, initial_a]), torch.cat([b, -initial_b], dim=1)

    def to_round(self) -> tuple[torch.Tensor, torch.Tensor, float] | None:
        """Return A, B and the scaling, if they are multiplied as they are; else ``None``."""
        return None

    def dropped(self, x: torch.Tensor) -> torch.Tensor:
        """Return ``dropout(x)`` in the dtype of ``A``, or as it is where autocast will choose."""
        if not torch.is_autocast_enabled(x.device.type):
            x = x.to(self.lora_A.dtype)
        dropped: torch.Tensor = self.lora_dropout(x)
        return dropped

    def per_output(self, vector: torch.Tensor) -> torch.Tensor:
        """Shape a vector ``[out]`` so that it broadcasts over the output."""
        return vector

    def float_weight(self) -> torch.Tensor:
        """Return the base's weight as ``[out, in]`` in a floating dtype."""
        turned = self.fan_in_fan_out or self.kind is ModuleKind.EMBEDDING
        return float_weight(self.base_layer, stored_in_out=turned)

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

        Returns:
            The layer's output, in the dtype of ``adapted``.
        """
        buffers = self._buffers
        there = (self._parameters["magnitude"], buffers["gain"], buffers["extra_bias"])
        if all(part is None for part in there):
            return adapted
        dtype = adapted.dtype
        gain = self.present_gain()
        if gain is not None:
            bias = getattr(self.base_layer, "bias", None)
            plain = adapted if bias is None else adapted - self.per_output(bias).to(adapted.dtype)
            # The gain is near 1: a narrow dtype holds its difference to that better.
            adapted = adapted + self.per_output(gain - 1).to(adapted.dtype) * plain
        if self.extra_bias is not None:
            adapted = adapted + self.per_output(self.extra_bias)
        return adapted.to(dtype)

    def present_gain(self) -> torch.Tensor | None:
        """Return the factor on each output, ``[out]``; ``None`` for plain LoRA."""
        if self.magnitude is None or self.squares is None:
            return self.gain
        a, b = (matrix.flatten(1) for matrix in self.matrices())
        return self.magnitude / row_norms(self.float_weight(), self.squares, a, b, self.scaling)

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
            weight = self.float_weight().to(self.lora_A.dtype)
            a, b = principal_matrices(
                weight, self.rank, self.scaling, init, generator.initial_seed()
            )
            self.initial_A = a.reshape(self.lora_A.shape)
            self.initial_B = b.reshape(self.lora_B.shape)
            self.lora_A.copy_(self.initial_A)
            self.lora_B.copy_(self.initial_B)
        if use_dora:
            self.squares = row_squares(self.float_weight(), self.lora_A.dtype)
            self.magnitude = nn.Parameter(self.squares.sqrt())
