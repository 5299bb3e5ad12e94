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


def seed_beside_the_first(seed: int, step: int, rank: int) -> None:
    """Seed the generators of a process other than the first, anew for every step.

    So that processes drop other inputs than one another, and a resumed run drops the same ones
    although only the first process's state is in its checkpoints.
    """
    seed_everything(random.Random(f"{seed} {step} {rank}").getrandbits(63))


def capture() -> RandomState:
    """Return the present state."""
    tensors = {"cpu": torch.get_rng_state()}
    for index in _own_gpus():
        tensors[f"cuda.{index}"] = torch.cuda.get_rng_state(index)
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    numpy_state = [name, np.asarray(keys).tolist(), int(position), int(has_gauss), float(cached)]
    return RandomState(tensors, {"python": [version, list(words), gauss], "numpy": numpy_state})


def restore(state: RandomState) -> None:
    """Go back to a state."""
    torch.set_rng_state(state.tensors["cpu"])
    for index in _own_gpus():
        if f"cuda.{index}" in state.tensors:
            torch.cuda.set_rng_state(state.tensors[f"cuda.{index}"], index)
    version, words, gauss = state.plain["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state.plain["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))


def require_state(state: RandomState) -> None:
    """Refuse what `restore` could not go back to; nothing global is changed.

    Raises:
        Exception: Of whichever generator refuses it.
    """
    torch.Generator().set_state(state.tensors["cpu"])
    version, words, gauss = state.plain["python"]
    random.Random().setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state.plain["numpy"]
    numbers = (name, np.array(keys, dtype=np.uint32), position, has_gauss, cached)
    np.random.RandomState().set_state(numbers)


def _own_gpus() -> range:
    """Return the GPUs that this process computes on: one of them where there are several."""
    if not torch.cuda.is_available():
        return range(0)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        present = torch.cuda.current_device()
        return range(present, present + 1)
    return range(torch.cuda.device_count())
