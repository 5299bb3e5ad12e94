"""What a sweep tries, and what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from loraport.training.options import LoraOptions

if TYPE_CHECKING:
    from loraport.adapter import LoraModule
    from loraport.training.run.checkpoints import RunState


@dataclass(frozen=True)
class Trial:
    """One candidate.

    Attributes:
        name: Names its adapter's directory; unique in a sweep.
        lora: What it adapts.
        learning_rate: Its peak learning rate.
    """

    name: str
    lora: LoraOptions
    learning_rate: float


@dataclass(frozen=True, eq=False)
class Outcome:
    """What came of one candidate.

    Attributes:
        name: The trial's.
        losses: Step and mean training loss of every step it took.
        validations: Step and validation loss; step 0 is the base alone.
        best: Step and loss of the best validation after the first step; ``None`` without any.
        row_losses: Summed loss of each validation row at the best step; a chat is one row.
        row_weights: How many losses each of them sums.
        modules: The adapter at the best step, or at the last without validations; empty if the
            candidate failed before it could be measured.
        ended: Why it ended before the last step; empty if it did not.
        failed: It ended because it could not go on.
        steps: How many it takes in all, if nothing ends it.
        paused: Whether it has not ended: it can go on from where it stands.
        state: All that its next step depends on; ``None`` if it has ended.
    """

    name: str
    losses: tuple[tuple[int, float], ...] = ()
    validations: tuple[tuple[int, float], ...] = ()
    best: tuple[int, float] | None = None
    row_losses: tuple[float, ...] = ()
    row_weights: tuple[int, ...] = ()
    modules: Mapping[str, LoraModule] | None = None
    ended: str = ""
    failed: bool = False
    steps: int = 0
    paused: bool = False
    state: RunState | None = None

    @property
    def step(self) -> int:
        """Steps taken so far."""
        return self.losses[-1][0] if self.losses else 0
