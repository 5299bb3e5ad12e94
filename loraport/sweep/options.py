"""Options of a sweep."""

from __future__ import annotations

from dataclasses import dataclass, field

from loraport.errors import Problems
from loraport.option_checks import check_count, check_parts, check_switches, check_text, is_whole
from loraport.plain_options import store_plain
from loraport.sweep.grid import Grid
from loraport.training.options import TrainOptions

_MOST_HALVINGS = 10  # of more than a thousand candidates one is left


@dataclass(frozen=True)
class Spread:
    """Over what a sweep is spread.

    Attributes:
        address: Of a Ray cluster; ``auto`` for the one this machine belongs to, ``local`` to start
            Ray here and stop it afterwards. Not looked at in a process that uses Ray already.
        workers: Processes, each with the base in memory and one GPU, or its share of the cores;
            ``None`` for one on every GPU, or on every machine where there is none.
    """

    address: str = "local"
    workers: int | None = None

    def __post_init__(self) -> None:
        problems = Problems()
        check_text(problems, "address", self.address, "auto, local or a cluster's address")
        if self.workers is not None:
            check_count(problems, "workers", self.workers, 1)
        problems.raise_if_any("sweep options cannot be used")


@dataclass(frozen=True)
class SweepOptions:
    """Options of ``loraport sweep``.

    Attributes:
        grid: The values tried.
        train: What all candidates share; its own rank, alpha, targets, layers and learning rate
            are not looked at.
        together: Most candidates trained in one pass; halved where memory runs out; 1 for each
            alone, ``None`` for as many as `loraport.sweep.groups.most_together` says.
        halving: How often the worse half of the candidates is given up: after ``1 / 2**halving``
            of their steps first, after half of them at last; 0 for never.
        keep_all: Keep the adapters of all candidates, not only of the one taken.
        spread: Train on the workers of a Ray cluster; ``None`` for this process.
    """

    grid: Grid = field(default_factory=Grid)
    train: TrainOptions = field(default_factory=TrainOptions)
    together: int | None = None
    halving: int = 0
    keep_all: bool = False
    spread: Spread | None = None

    def __post_init__(self) -> None:
        store_plain(self)
        problems = Problems()
        check_parts(problems, self, grid=Grid, train=TrainOptions)
        if self.spread is not None:
            check_parts(problems, self, spread=Spread)
        if self.together is not None:
            check_count(problems, "together", self.together, 1)
        if not is_whole(self.halving):
            problems.add("halving", "a whole number", repr(self.halving))
        elif not 0 <= self.halving <= _MOST_HALVINGS:
            problems.add("halving", f"from 0 to {_MOST_HALVINGS}", str(self.halving))
        check_switches(problems, self, "keep_all")
        problems.raise_if_any("sweep options cannot be used")
