"""The in-memory adapter that every reader produces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from loraport.errors import LoraportError
from loraport.fingerprint import BaseFingerprint
from loraport.scaling import lora_scaling

if TYPE_CHECKING:
    import torch

BATCH_COUNTER = "num_batches_tracked"  # of a batch norm: an integer, of which no output depends


class ModuleKind(StrEnum):
    """What kind of module an adapter's tensors belong to; decides their shapes."""

    LINEAR = "linear"
    EMBEDDING = "embedding"
    CONV = "conv"
    EXPERTS = "experts"


@dataclass(frozen=True, eq=False)
class LoraModule:
    """One adapted module, as trained.

    Attributes:
        kind: Decides the shapes below.
        lora_A: linear ``[r, in]``; embedding ``[r, vocab]``; conv ``[r, in, *kernel]``;
            experts ``[experts * r, in]``, one expert after the other.
        lora_B: linear ``[out, r]``; embedding ``[dim, r]``; conv ``[out, r / groups, 1, ...]``;
            experts ``[out, r * experts]``, the experts of one rank side by side.
        alpha: ``lora_alpha`` of this module.
        use_rslora: Rank-stabilised scaling.
        fan_in_fan_out: The base weight is stored ``[in, out]`` (transformers' ``Conv1D``).
        lora_B_bias: ``[out]``, bias of ``lora_B`` (PEFT's ``lora_bias``).
        magnitude: ``[out]``, DoRA's magnitude vector (Liu et al. 2024, arXiv:2402.09353).
        experts: Number of experts of a fused parameter; its module path is then the
            parameter's own path.
    """

    kind: ModuleKind
    lora_A: torch.Tensor  # noqa: N815  the field's name for it
    lora_B: torch.Tensor  # noqa: N815  the field's name for it
    alpha: float
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    lora_B_bias: torch.Tensor | None = None  # noqa: N815  the field's name for it
    magnitude: torch.Tensor | None = None
    experts: int = 1

    @property
    def rank(self) -> int:
        """Rank, read off ``lora_A``; of one expert where there are several."""
        return int(self.lora_A.shape[0]) // self.experts

    @property
    def groups(self) -> int:
        """Groups of the convolution; 1 for everything else.

        PEFT groups ``lora_B`` only: ``lora_A`` sees the channels of all groups.
        """
        return int(self.lora_A.shape[0]) // int(self.lora_B.shape[1])

    @property
    def scaling(self) -> float:
        """Factor on ``B (A x)``."""
        return lora_scaling(self.rank, self.alpha, use_rslora=self.use_rslora)

    def tensors(self) -> dict[str, torch.Tensor]:
        """Return this module's tensors by field name, absent ones left out."""
        named = {
            "lora_A": self.lora_A,
            "lora_B": self.lora_B,
            "lora_B_bias": self.lora_B_bias,
            "magnitude": self.magnitude,
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True, eq=False)
class Replacement:
    """A parameter, or a running statistic, of the base that the adapter stores anew.

    Attributes:
        tensor: The whole parameter, or its rows ``[n, dim]`` where ``rows`` is given.
        rows: Row numbers ``tensor`` replaces (trainable tokens), or ``None`` for all.
    """

    tensor: torch.Tensor
    rows: tuple[int, ...] | None = None


@dataclass(frozen=True, eq=False)
class Adapter:
    """Everything one adapter says, whatever format it came from.

    Attributes:
        modules: Module path → its low-rank tensors.
        replacements: Path of a parameter, or of a buffer of floats → what it is replaced with.
        base_model: Name or path of the base, as the adapter's own file gives it.
        base_fingerprint: Content hashes of the base weights it was trained on, where known.
        training: Facts about the training that do not change the maths (dropout, task type).
        counters: Buffer path → how many batches a normalization that is stored as a whole has
            seen (``num_batches_tracked``, an integer); no output depends on it.
    """

    modules: Mapping[str, LoraModule]
    replacements: Mapping[str, Replacement] = field(default_factory=dict)
    base_model: str | None = None
    base_fingerprint: BaseFingerprint | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    counters: Mapping[str, torch.Tensor] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self._tensors())

    @property
    def parameters(self) -> int:
        """Number of elements of all tensors."""
        return sum(tensor.numel() for tensor in self._tensors())

    def _tensors(self) -> Iterator[torch.Tensor]:
        for module in self.modules.values():
            yield from module.tensors().values()
        for replacement in self.replacements.values():
            yield replacement.tensor


def require_adapter(given: object, name: str = "the adapter") -> None:
    """Refuse what is no `Adapter`, such as the path of one.

    Raises:
        LoraportError: If it is none.
    """
    if not isinstance(given, Adapter):
        shown = repr(str(given)) if isinstance(given, (str, PurePath)) else type(given).__name__
        raise LoraportError(
            f"{name}: expected an Adapter, got {shown}; read one with "
            "converters.formats.registry.read_adapter"
        )


def require_adapters(given: object) -> None:
    """Refuse what does not map names to `Adapter`, such as a list of them.

    Raises:
        LoraportError: If it does not.
    """
    if not isinstance(given, Mapping):
        raise LoraportError(
            f"adapters: expected a mapping from names to Adapters, got {type(given).__name__}"
        )
    for name, adapter in given.items():
        require_adapter(adapter, f"adapter {name!r}")
