"""What the tensors of a quantized checkpoint stand for, whatever its format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from converters.merge.sources import Source
from loraport.base.checkpoint import Checkpoint
from loraport.errors import Problems

# A torch dtype's name → safetensors'.
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


@dataclass(frozen=True, eq=False)
class QuantizedCheckpoint:
    """A checkpoint, and what is said about how it was quantized.

    Attributes:
        checkpoint: Its tensors: codes, scales, and weights that are floats as they are.
        settings: ``quantization_config`` of its ``config.json``.
        dtype: What the model computes in, for weights that say nothing of it themselves.
    """

    checkpoint: Checkpoint
    settings: Mapping[str, Any]
    dtype: str


@dataclass(frozen=True, eq=False)
class Dequantized:
    """The float weights that a format's reader found.

    Attributes:
        weights: Stored name of the codes → name of the weight, and its values.
        parts: Names of all else that is of no use without the codes, scales above all.
        problems: What cannot be dequantized.
    """

    weights: dict[str, tuple[str, Source]] = field(default_factory=dict)
    parts: set[str] = field(default_factory=set)
    problems: Problems = field(default_factory=Problems)

    def shards(
        self, shards: Mapping[Path, Mapping[str, Source]], checkpoint: Path
    ) -> dict[Path, dict[str, Source]]:
        """Return the shards with every weight in the place of its codes, without its parts.

        Raises:
            LoraportError: If there are problems, all at once.
        """
        self.problems.raise_if_any(f"checkpoint {checkpoint} cannot be dequantized")
        found = {
            file: dict(
                self.weights.get(name, (name, source))
                for name, source in tensors.items()
                if name not in self.parts
            )
            for file, tensors in shards.items()
        }
        return {file: tensors for file, tensors in found.items() if tensors}


def computing_dtype(config: Mapping[str, Any]) -> str:
    """Return the safetensors name of a model's own dtype; bfloat16 where none is told."""
    nested = config.get("text_config")
    for settings in (config, nested if isinstance(nested, dict) else {}):
        for key in ("dtype", "torch_dtype"):
            if str(settings.get(key)) in DTYPES:
                return DTYPES[str(settings[key])]
    return "BF16"
