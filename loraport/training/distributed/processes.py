"""The processes of one run, as ``torchrun`` starts them, and what they tell each other.

The base is frozen, so all that has to be exchanged is a few megabytes of LoRA gradients: they are
laid into one flat buffer and summed once a step. Loss functions return sums, so the sum over
processes divided by the sum of the weights is the exact mean over the whole batch, however
unevenly tokens fall. ``DistributedDataParallel`` would average the processes' means instead, wrap
the model (another name for every parameter) and overlap its buckets with a backward pass that
takes much longer than they do.

Numbers that are known on the host go over gloo, also beside NCCL: no GPU is waited for.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.rendezvous import rendezvous

from loraport.errors import LoraportError

T = TypeVar("T")
_ENVIRONMENT = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# Seconds.
_FIRST_ONES_START, _LOOK_EVERY, _TIME_TO_END = 1.0, 1.0, 5.0


@dataclass(frozen=True)
class Processes:
    """The processes that train together, seen from one of them.

    Attributes:
        rank: Number of this process, the first being 0. Only the first writes and prints.
        size: How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Tell whether this process is the one that writes and prints."""
        return self.rank == 0

    def sums(self, *values: float) -> list[float]:
        """Return the sums of numbers over all processes, in float64."""
        if self.size == 1:
            return list(values)
        numbers = torch.tensor(values, dtype=torch.float64)
        _reached(lambda: dist.all_reduce(numbers))
        found: list[float] = numbers.tolist()
        return found

    def largest(self, value: float) -> float:
        """Return the largest of the processes' numbers."""
        if self.size == 1:
            return value
        number = torch.tensor(value, dtype=torch.float64)
        _reached(lambda: dist.all_reduce(number, dist.ReduceOp.MAX))
        return float(number)

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over all processes.

        A parameter that took part in no process keeps no gradient, as in a single process.
        """
        if self.size == 1:
            return
        chosen = list(parameters)
        used = self.sums(*(float(parameter.grad is not None) for parameter in chosen))
        chosen = [parameter for parameter, count in zip(chosen, used, strict=True) if count]
        for dtype in dict.fromkeys(parameter.dtype for parameter in chosen):
            _sum_flat([parameter for parameter in chosen if parameter.dtype is dtype])

    def from_first(self, make: Callable[[], T]) -> T:
        """Return on every process what the first one makes.

        Args:
            make: Called by the first process only; its value goes through pickle, between
                processes of one run that trust each other.
        """
        if self.size == 1:
            return make()
        box: list[Any] = [make() if self.first else None]
        _reached(lambda: dist.broadcast_object_list(box, src=0))
        value: T = box[0]
        return value

    def from_all(self, value: T) -> list[T]:
        """Return every process's value, through pickle."""
        if self.size == 1:
            return [value]
        box: list[Any] = [None] * self.size
        _reached(lambda: dist.all_gather_object(box, value))
        return box

    def wait(self) -> None:
        """Wait until every process has come here."""
        self.sums(0.0)


def _sum_flat(parameters: list[nn.Parameter]) -> None:
    sizes = [parameter.numel() for parameter in parameters]
    flat = torch.cat(
        [
            (torch.zeros_like(parameter) if parameter.grad is None else parameter.grad).flatten()
            for parameter in parameters
        ]
    )
    _reached(lambda: dist.all_reduce(flat))
    for parameter, summed in zip(parameters, torch.split(flat, sizes), strict=True):
        parameter.grad = summed.view_as(parameter)


def _reached(exchange: Callable[[], Any]) -> None:
    try:
        exchange()
    except RuntimeError as error:
        # torch's own words name sockets and lines of its code, and this process's peer alone.
        late = any(word in str(error).lower() for word in ("timed out", "timeout"))
        what = "did not answer in time" if late else "ended or cannot be reached"
        raise LoraportError(
            f"another process of this run {what}; look at what it said (torchrun tells which one "
            "failed first), then continue with --resume"
        ) from error


def processes_now() -> Processes:
    """Return the processes of the run that this one belongs to; itself alone where there is none.

    Whoever called ``torch.distributed.init_process_group`` before training, be it `joined` or a
    script of the user's, trains with all its processes.
    """
    if dist.is_available() and dist.is_initialized():
        return Processes(dist.get_rank(), dist.get_world_size())
    return Processes()


def processes_here() -> int:
    """Return how many of the processes that ``torchrun`` started run on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


@contextlib.contextmanager
def joined(device: str) -> Iterator[Processes]:
    """Join the processes that ``torchrun`` started, for the length of a command.

    Where one of them fails, it alone says why and all end: those that fail in its wake, or of the
    same cause, end without a word, and ``torchrun`` stops the others.

    Args:
        device: ``"auto"`` or a torch device; each process takes a GPU of its own.

    Raises:
        LoraportError: If there are more processes on this machine than GPUs, one GPU is named for
            all of them, or they cannot meet.
    """
    alone = not all(name in os.environ for name in _ENVIRONMENT)
    if alone or os.environ["WORLD_SIZE"] == "1" or dist.is_initialized():
        yield processes_now()
        return
    store, rank, size = _met()
    done = threading.Event()
    threading.Thread(target=_end_with_the_others, args=(store, done), daemon=True).start()
    try:
        on_gpu = _take_gpu(device)
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size)
        yield Processes(rank, size)
    except BaseException:
        if rank:
            # What fails on all of them the first one says, which knows the checkpoints. Where that
            # one was killed, torchrun asks the others to end meanwhile: they tell what they found.
            with contextlib.suppress(KeyboardInterrupt):
                time.sleep(_FIRST_ONES_START)
        if _is_first_to_fail(store):
            raise
        sys.exit(2)
    finally:
        done.set()
    dist.destroy_process_group()


def _met() -> tuple[Any, int, int]:
    """Return the store that the processes meet at, this one's number and how many there are."""
    told = {name: os.environ[name] for name in _ENVIRONMENT}
    try:
        if not 0 <= int(told["RANK"]) < int(told["WORLD_SIZE"]):
            raise ValueError("no such process")
        store, rank, size = next(rendezvous("env://"))
    except (RuntimeError, ValueError, OSError) as error:
        got = ", ".join(f"{name}={value}" for name, value in told.items())
        raise LoraportError(
            "the processes of this run cannot meet: expected each RANK below WORLD_SIZE and a free "
            f"MASTER_PORT on the machine MASTER_ADDR, where the first one listens, got {got}; "
            "start them with torchrun, with another --master-port where this one is taken"
        ) from error
    return store, rank, size


def _take_gpu(device: str) -> bool:
    """Make this process's own GPU the present one; tell whether there is one."""
    if device == "cpu" or not torch.cuda.is_available():
        return False
    local = int(os.environ.get("LOCAL_RANK", "0"))
    there = torch.cuda.device_count()
    if ":" in device and processes_here() > 1:
        raise LoraportError(
            f"device {device!r}: expected auto or cuda, so that each process takes a GPU of its "
            "own, got one GPU for all"
        )
    if local >= there:
        raise LoraportError(
            f"process {local} of this machine: expected a GPU of its own, got {there} GPUs; "
            f"use --nproc-per-node {there}, or --device cpu"
        )
    torch.cuda.set_device(local)
    return True


def _end_with_the_others(store: Any, done: threading.Event) -> None:
    """End this process soon after another has failed, even if it waits for that one on a GPU."""
    while not done.wait(_LOOK_EVERY):
        try:
            failed = store.check([_failed_key()])
        except RuntimeError:
            failed = True
        if failed and not done.wait(_TIME_TO_END):
            os._exit(2)


def _is_first_to_fail(store: Any) -> bool:
    try:
        return bool(store.add(_failed_key(), 1) == 1)
    except RuntimeError:
        # The process that kept the store is gone: it failed before.
        return False


def _failed_key() -> str:
    """Return a key that torchrun's restarts do not share, whose store lives on."""
    return f"loraport failed {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
