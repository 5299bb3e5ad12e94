"""How the batches of a step are shared between processes.

What one optimizer step sees does not depend on the number of processes: each process takes a
part of every batch. So the same command trains the same adapter on one process and on eight, and
a run goes on from its checkpoint with any number of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from loraport.errors import LoraportError
from loraport.training.distributed.processes import Processes
from loraport.training.distributed.stream import Batches, EpochBatches
from loraport.training.options import TrainOptions


@dataclass(frozen=True)
class Idle:
    """A batch run for company and counted nowhere.

    A process without a part in a batch runs another's, since all processes of a sharded base
    have to call its layers equally often.

    Attributes:
        batch: What to run.
    """

    batch: Any


@runtime_checkable
class Divisible(Protocol):
    """Batches that can be divided row by row."""

    def share(self, rank: int, size: int) -> EpochBatches:
        """Return as many batches as there are, each with every ``size``-th row from ``rank`` on.

        Where no row is left for a process, its batch is `Idle`.
        """
        ...


def share(batches: Batches, processes: Processes, accumulate: int) -> Batches:
    """Return the batches that a process iterates: its rows of each, where they can be divided.

    Args:
        batches: The batches of the whole run.
        processes: Those that share them.
        accumulate: Batches per step.

    Raises:
        LoraportError: If some processes would never have anything to do.
    """
    if processes.size == 1:
        return batches
    if isinstance(batches, Divisible):
        return batches.share(processes.rank, processes.size)
    if accumulate < processes.size:
        raise LoraportError(
            f"accumulate: expected at least {processes.size}, since whole batches are dealt to "
            f"{processes.size} processes, got {accumulate}; or give batches with "
            "share(rank, size), which divides each of them"
        )
    return batches


def own_part(group: Sequence[Any], batches: Batches, processes: Processes) -> list[Any]:
    """Return what a process computes of one step's batches, the same number on every process.

    Args:
        group: One step's batches, as iterated from what `share` returned.
        batches: What `share` was given.
        processes: Those that share them.
    """
    if processes.size == 1 or isinstance(batches, Divisible):
        return list(group)
    mine = list(group[processes.rank :: processes.size])
    most = -(-len(group) // processes.size)
    return mine + [Idle(group[0])] * (most - len(mine))


def own_parts(batches: Batches, processes: Processes) -> Iterator[Any]:
    """Iterate what a process computes of one pass over batches, of which each counts alone."""
    if processes.size > 1 and isinstance(batches, Divisible):
        batches = batches.share(processes.rank, processes.size)
        yield from batches.epoch(0)
        return
    present: Iterable[Any] = batches.epoch(0) if isinstance(batches, EpochBatches) else batches
    iterator = iter(present)
    while group := list(itertools.islice(iterator, processes.size)):
        yield from own_part(group, batches, processes)


def unpacked(batch: Any) -> tuple[Any, bool]:
    """Return a batch and whether it counts."""
    return (batch.batch, False) if isinstance(batch, Idle) else (batch, True)


def refuse_for_processes(options: TrainOptions, processes: Processes) -> None:
    """Refuse what several processes cannot do.

    Raises:
        LoraportError: Naming the option.
    """
    flags = {
        "--compile": options.compile,
        "--cuda-graphs": options.cuda_graphs,
        "--liger-kernel": options.liger_kernel,
    }
    for flag in [flag for flag, given in flags.items() if given]:
        if options.loop.shard_base and processes.size > 1:
            raise LoraportError(
                f"{flag}: expected a base that every process has whole, got --shard-base; leave "
                "out one of them"
            )
    if options.batch_size < processes.size:
        raise LoraportError(
            f"--batch-size {options.batch_size}: expected at least a row for each of "
            f"{processes.size} processes, which share every batch; raise it"
        )
