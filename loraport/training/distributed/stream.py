"""Batches in the order training meets them, from any position on."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any, Protocol, runtime_checkable

from loraport.errors import LoraportError
from loraport.training import rng
from loraport.training.distributed.processes import Processes


@runtime_checkable
class EpochBatches(Protocol):
    """Batches whose order depends on the epoch."""

    def epoch(self, number: int) -> Iterable[Any]:
        """Return one epoch's batches; the same number always gives the same."""
        ...


Batches = EpochBatches | Iterable[Any]


class EndOfEpoch:
    """Stands in the stream where an epoch ends."""


class BatchStream:
    """Groups of batches, epoch after epoch, without end.

    Attributes:
        epoch: Number of the present epoch, the first being 0.
        index: Batches of this epoch handed out so far.
        batches: What it goes through.
        epoch_start: Random state when this epoch's iteration began, for batches that draw
            their order from the global generators (a shuffling ``DataLoader``).

    Args:
        batches: `EpochBatches`, or any iterable that can be iterated once per epoch.
        group: Batches per group; an epoch's last group may have fewer.
        processes: Those that iterate together; all begin an epoch with the random state of the
            first, so that an order drawn from it is the same for all.
    """

    def __init__(self, batches: Batches, group: int, processes: Processes | None = None) -> None:
        self.batches = batches
        self._group = group
        self._processes = processes or Processes()
        self.epoch = 0
        self.index = 0
        self.epoch_start = rng.capture()

    def seek(self, epoch: int, index: int, epoch_start: rng.RandomState) -> None:
        """Continue from a position; to be called before iteration starts."""
        self.epoch, self.index, self.epoch_start = epoch, index, epoch_start

    def __iter__(self) -> Iterator[list[Any] | EndOfEpoch]:
        """Iterate from the present position on.

        Raises:
            LoraportError: If an epoch has no batches.
        """
        while True:
            iterator = self._begin()
            while group := list(itertools.islice(iterator, self._group)):
                self.index += len(group)
                yield group
            if self.index == 0:
                raise LoraportError(
                    f"batches: expected some in epoch {self.epoch + 1}, got none; give something "
                    "that can be iterated again for every epoch, such as a list or a DataLoader"
                )
            yield EndOfEpoch()
            self.epoch, self.index = self.epoch + 1, 0

    def _begin(self) -> Iterator[Any]:
        """Start the epoch's iteration and skip what was handed out before."""
        present = rng.capture()
        if self.index:
            rng.restore(self.epoch_start)
        else:
            self.epoch_start = self._processes.from_first(lambda: present)
            if not self._processes.first:
                rng.restore(self.epoch_start)
        batches = self.batches
        iterator = iter(batches.epoch(self.epoch) if isinstance(batches, EpochBatches) else batches)
        skipped = sum(1 for _ in itertools.islice(iterator, self.index))
        if skipped < self.index:
            raise LoraportError(
                f"batches: expected {self.index} already seen in epoch {self.epoch + 1}, got "
                f"{skipped}; resume with the batches the run began with"
            )
        if self.index:
            rng.restore(present)
        return iterator
