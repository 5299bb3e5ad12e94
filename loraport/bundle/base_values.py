"""``base_values.safetensors``: the base's own values of parameters that adapters may replace.

The graph has them as defaults. Runtimes that see no defaults feed them from this file
(``model.required.onnx``), and blends move away from them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from loraport.base.checkpoint import Checkpoint
from loraport.output import new_file

if TYPE_CHECKING:
    import torch

BASE_VALUES_FILE = "base_values.safetensors"


def write_base_values(bundle: Path, values: Mapping[str, torch.Tensor]) -> None:
    """Write the values by graph input; no file where there are none."""
    from safetensors.torch import save_file

    if values:
        with new_file(bundle / BASE_VALUES_FILE, force=True) as partial:
            save_file(dict(values), partial)


class BaseValues(Mapping[str, np.ndarray]):
    """The values by graph input, each read when it is asked for.

    Args:
        bundle: The bundle's directory.

    Raises:
        LoraportError: If the file is damaged.
    """

    def __init__(self, bundle: Path) -> None:
        file = bundle / BASE_VALUES_FILE
        self._checkpoint = Checkpoint(file) if file.is_file() else None

    def __getitem__(self, name: str) -> np.ndarray:
        if self._checkpoint is None:
            raise KeyError(name)
        return self._checkpoint.load_array(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._checkpoint or ())

    def __len__(self) -> int:
        return 0 if self._checkpoint is None else len(self._checkpoint)
