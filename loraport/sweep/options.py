"""Options of a sweep."""

from __future__ import annotations

from dataclasses import dataclass, field

from loraport.errors import Problems
from loraport.sweep.grid import Grid
from loraport.training.options import TrainOptions


@dataclass(frozen=True)
class SweepOptions:
    """Options of ``loraport sweep``.

    Attributes:
        grid: The values tried.
        train: What all candidates share; its own rank, alpha, targets, layers and learning rate
            are not looked at.
        together: Most candidates trained in one pass; 0 for as many as fit, 1 for each alone.
        keep_all: Keep the adapters of all candidates, not only of the one taken.
        workers: Ray: how many processes on this machine, or the address of a cluster; empty for
            this process.
    """

    grid: Grid = field(default_factory=Grid)
    train: TrainOptions = field(default_factory=TrainOptions)
    together: int = 0
    keep_all: bool = False
    workers: str = ""

    def __post_init__(self) -> None:
        problems = Problems()
        if self.together < 0:
            problems.add("together", "at least 0", str(self.together))
        if self.workers.lstrip("-").isdigit() and int(self.workers) < 1:
            problems.add("workers", "at least 1, or the address of a Ray cluster", self.workers)
        problems.raise_if_any("sweep options cannot be used")
