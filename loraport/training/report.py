"""Show a run to a person: a progress bar, or lines where there is no terminal."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

if TYPE_CHECKING:
    from loraport.training.memory.dry_run import DryRun
    from loraport.training.text import TrainingSummary

_LINES = 10  # without a terminal, about this many progress lines a run


class ProgressReport:
    """An observer that shows loss, tokens per second and the time left.

    Args:
        console: Where to; progress belongs on stderr.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[speed]:.0f} tokens/s"),
            TextColumn("ETA"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("training", loss=float("nan"), speed=0.0)
        self._steps = self._done = self._tokens = 0
        self._seconds = 0.0
        self._since = time.monotonic()

    def started(self, *, steps: int, done: int) -> None:
        """Show the bar."""
        self._steps, self._done = steps, done
        self._progress.update(self._task, total=steps, completed=done)
        self._progress.start()
        self._since = time.monotonic()

    def stepped(self, *, step: int, loss: float, learning_rate: float, tokens: int) -> None:
        """Move the bar on."""
        del learning_rate
        now = time.monotonic()
        self._seconds, self._since = self._seconds + now - self._since, now
        self._tokens += tokens
        speed = self._tokens / self._seconds if self._seconds else 0.0
        self._progress.update(self._task, completed=step, loss=loss, speed=speed)
        if not self._console.is_terminal and (step == self._steps or step % self._interval() == 0):
            left = self._seconds / (step - self._done) * (self._steps - step)
            self._console.print(
                f"step {step}/{self._steps}  loss {loss:.4f}  {speed:.0f} tokens/s  "
                f"{left:.0f} s left",
                highlight=False,
            )

    def validated(self, *, step: int, loss: float) -> None:
        """Say the validation loss."""
        what = "base" if step == 0 else f"step {step}"
        self._console.print(f"validation loss, {what}: {loss:.4f}", highlight=False)
        self._since = time.monotonic()  # validating is not training speed

    def note(self, text: str) -> None:
        """Say it."""
        self._console.print(f"note: {text}", highlight=False, soft_wrap=True, markup=False)

    def finished(self) -> None:
        """Take the bar away."""
        self._progress.stop()

    def _interval(self) -> int:
        return max(1, self._steps // _LINES)


def summary_table(summary: TrainingSummary) -> Table:
    """Return the table shown at the end."""
    table = Table(
        title=f"adapter {escape(summary.adapter)}", show_header=False, title_justify="left"
    )
    table.add_column(justify="left")
    table.add_column(justify="right")
    table.add_row("base", escape(summary.base))
    share = f"{summary.trainable_parameters:,} ({summary.trainable_share:.2%})"
    table.add_row("trainable parameters", share)
    table.add_row("adapter size", f"{summary.adapter_bytes / 1e6:.1f} MB")
    table.add_row("rows: training, validation", f"{summary.rows:,}, {summary.validation_rows:,}")
    if summary.truncated_rows or summary.dropped_rows:
        table.add_row("rows: cut, left out", f"{summary.truncated_rows}, {summary.dropped_rows}")
    table.add_row("steps, tokens", f"{summary.steps:,}, {summary.tokens:,}")
    table.add_row("device, precision", f"{summary.device}, {summary.dtype}")
    if summary.recorded_passes:
        table.add_row("shapes of batches recorded", f"{summary.recorded_passes}")
    table.add_row("training loss, last tenth", f"{summary.training_loss:.4f}")
    if summary.base_validation_loss is not None and summary.validation_loss is not None:
        table.add_row("validation loss, base", f"{summary.base_validation_loss:.4f}")
        last = summary.kept_step == summary.steps
        kept = "adapted" if last else f"step {summary.kept_step}, kept"
        change = summary.validation_loss / summary.base_validation_loss - 1
        table.add_row(f"validation loss, {kept}", f"{summary.validation_loss:.4f} ({change:+.1%})")
    else:
        table.add_row("validation loss", "no validation rows")
    return table


def memory_table(found: DryRun) -> Table:
    """Return the table of ``--dry-run``."""
    title = f"memory of a run on {escape(found.base)}, predicted"
    each = ""
    if found.processes > 1:
        title, each = f"{title}, of each of {found.processes} processes", " for each"
    table = Table(title=title, title_justify="left")
    table.add_column("what", justify="left")
    table.add_column("GB", justify="right")
    kept = found.prediction.kept
    for name, count in {
        "base, frozen": kept.base,
        "adapter": kept.adapter,
        "optimizer": kept.optimizer,
        "a step at its peak": found.prediction.step.peak,
        "  activations of a full batch": found.prediction.step.activations,
        "  gradients": kept.gradients,
        "recorded passes": found.prediction.recorded,
    }.items():
        if name == "recorded passes" and not count:
            continue
        table.add_row(name, f"{count / 1e9:.3f}")
    table.add_section()
    table.add_row("in all", f"{found.prediction.total / 1e9:.3f}")
    verdict = "it fits" if found.fits else "it does not fit"
    table.add_row(f"free on {found.device}{each}: {verdict}", f"{found.available / 1e9:.3f}")
    for flags, prediction in found.alternatives.items():
        fits = "fits" if prediction.total <= found.available else "does not fit"
        table.add_row(f"{flags} ({fits})", f"{prediction.total / 1e9:.3f}")
    return table
