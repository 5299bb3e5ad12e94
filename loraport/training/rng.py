"""The state of every random generator, as tensors and JSON."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True, eq=False)
class RandomState:
    """State of Python's, NumPy's, torch's and CUDA's global generators.

    Attributes:
        tensors: ``cpu`` and ``cuda.N`` → torch's state as uint8.
        plain: Python's and NumPy's states as JSON values.
    """

    tensors: dict[str, torch.Tensor]
    plain: dict[str, Any]


def seed_everything(seed: int) -> None:
    """Seed all global generators."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def capture() -> RandomState:
    """Return the present state."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        for index, state in enumerate(torch.cuda.get_rng_state_all()):
            tensors[f"cuda.{index}"] = state
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    numpy_state = [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)]
    return RandomState(tensors, {"python": [version, list(words), gauss], "numpy": numpy_state})


def restore(state: RandomState) -> None:
    """Go back to a state."""
    torch.set_rng_state(state.tensors["cpu"])
    for name, tensor in state.tensors.items():
        if name.startswith("cuda."):
            torch.cuda.set_rng_state(tensor, int(name.removeprefix("cuda.")))
    version, words, gauss = state.plain["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state.plain["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
