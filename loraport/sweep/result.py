"""What came of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraport.sweep.choose import Choice
    from loraport.sweep.worker import Trained


@dataclass(frozen=True)
class Line:
    """One candidate in the table.

    Attributes:
        name: The candidate.
        rank: Its rank.
        alpha: Its alpha.
        targets: What it adapts.
        layers: In which layers; empty for all.
        learning_rate: Peak learning rate.
        parameters: Numbers trained.
        adapter_bytes: Size of the adapter's tensors.
        training_loss: Mean of the last tenth of its steps.
        validation_loss: At its best step.
        best_step: That step.
        above_best: Validation loss less that of the best candidate.
        standard_error: Of that difference.
        within_noise: Whether the difference is no larger than that.
        taken: Whether it is the one to take.
        ended: Why it ended early.
    """

    name: str
    rank: int
    alpha: float
    targets: str
    layers: str
    learning_rate: float
    parameters: int
    adapter_bytes: int
    training_loss: float | None
    validation_loss: float | None
    best_step: int | None
    above_best: float | None
    standard_error: float | None
    within_noise: bool
    taken: bool
    ended: str


@dataclass(frozen=True)
class SweepResult:
    """What came of a sweep.

    Attributes:
        directory: Where it lies; the adapter taken in PEFT's layout.
        base: The base as it was named.
        base_validation_loss: Of the base alone.
        taken: Name of the candidate to take.
        best: Name of that with the lowest validation loss.
        reason: Why the one is taken.
        better_than_base: Whether it is better than the base alone.
        candidates: All of them, the best first.
    """

    directory: str
    base: str
    base_validation_loss: float
    taken: str
    best: str
    reason: str
    better_than_base: bool
    candidates: tuple[Line, ...]


def sweep_result(base: str, out: Path, trained: Sequence[Trained], choice: Choice) -> SweepResult:
    """Return what came of a sweep.

    Args:
        base: The base as it was named.
        out: Where the result is to lie.
        trained: All candidates.
        choice: Which of them to take.
    """
    lines = [_line(each, choice) for each in trained]
    lines.sort(key=lambda line: (line.above_best is None, line.above_best or 0.0))
    sound = next(t.outcome for t in trained if t.trial.name == choice.best)
    return SweepResult(
        directory=str(out),
        base=base,
        base_validation_loss=sound.validations[0][1],
        taken=choice.taken,
        best=choice.best,
        reason=choice.reason,
        better_than_base=choice.better_than_base,
        candidates=tuple(lines),
    )


def _line(trained: Trained, choice: Choice) -> Line:
    trial, outcome, adapter = trained.trial, trained.outcome, trained.adapter
    last = [loss for _, loss in outcome.losses[-max(1, len(outcome.losses) // 10) :]]
    difference = choice.differences.get(trial.name)
    targets = trial.lora.targets
    return Line(
        name=trial.name,
        rank=trial.lora.rank,
        alpha=trial.lora.effective_alpha,
        targets=targets if isinstance(targets, str) else ",".join(targets),
        layers=trial.lora.layers,
        learning_rate=trial.learning_rate,
        parameters=adapter.parameters if adapter else 0,
        adapter_bytes=adapter.nbytes if adapter else 0,
        training_loss=sum(last) / len(last) if last else None,
        validation_loss=outcome.best[1] if outcome.best else None,
        best_step=outcome.best[0] if outcome.best else None,
        above_best=difference.mean if difference else None,
        standard_error=difference.error if difference else None,
        within_noise=difference is not None and difference.within_noise,
        taken=trial.name == choice.taken,
        ended=outcome.ended,
    )
