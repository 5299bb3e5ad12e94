"""The loss curve as a picture."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loraport.training.run.loop import TrainingResult


def draw_losses(result: TrainingResult, path: Path) -> None:
    """Draw the training loss of every step, its running mean and the validation losses.

    Args:
        result: What to draw.
        path: The ``.png`` to write.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not pyplot: it keeps global state and may look for a display.
    figure = Figure(figsize=(7, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    if result.losses:
        steps = [step for step, _ in result.losses]
        losses = [loss for _, loss in result.losses]
        axes.plot(steps, losses, color="#9ecae1", linewidth=1, label="training, each step")
        means = running_mean(losses, max(1, len(losses) // 20))
        axes.plot(steps, means, color="#08519c", linewidth=1.8, label="training, running mean")
    if result.validations:
        steps = [step for step, _ in result.validations]
        losses = [loss for _, loss in result.validations]
        axes.plot(steps, losses, "o-", color="#d94801", label="validation (step 0: base)")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, format="png")


def running_mean(values: list[float], window: int) -> list[float]:
    """Return the mean of each value and up to ``window - 1`` before it.

    >>> running_mean([1.0, 3.0, 5.0], 2)
    [1.0, 2.0, 4.0]
    """
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means
