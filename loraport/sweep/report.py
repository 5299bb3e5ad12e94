"""Show a sweep to a person."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loraport.counts import counted
from loraport.sweep.observer import SilentSweep

if TYPE_CHECKING:
    from loraport.sweep.result import SweepResult

_LINES = 10  # progress lines a group, about


class SweepReport(SilentSweep):
    """An observer that prints lines.

    Args:
        console: Where to; progress belongs on stderr.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._steps = 0

    def planned(self, *, groups: int, trials: int, done: int) -> None:
        """Say how much there is to do."""
        self._say(
            f"{counted(trials, 'candidate')}, {done} finished before; passes to train: {groups}"
        )

    def group_started(self, *, names: Sequence[str], steps: int, done: int) -> None:
        """Say which candidates begin."""
        self._steps = steps
        self._say(f"training {', '.join(names)}" + (f" from step {done}" if done else ""))

    def stepped(self, *, step: int, losses: Mapping[str, float], tokens: int) -> None:
        """Say now and then how far it is."""
        del tokens
        if step == self._steps or step % max(1, self._steps // _LINES) == 0:
            name, loss = min(losses.items(), key=itemgetter(1), default=("", float("nan")))
            self._say(f"step {step}/{self._steps}  lowest training loss {loss:.4f} ({name})")

    def validated(self, *, step: int, losses: Mapping[str, float]) -> None:
        """Say the validation losses."""
        shown = ", ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        self._say(f"validation loss, step {step}: {shown}")

    def ended(self, *, name: str, reason: str) -> None:
        """Say who ended early."""
        self._say(f"{name} ended: {reason}")

    def note(self, text: str) -> None:
        """Say it."""
        self._say(f"note: {text}")

    def _say(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


def results_table(result: SweepResult) -> Table:
    """Return the table shown at the end."""
    table = Table(title=f"base alone {result.base_validation_loss:.4f}", title_justify="left")
    table.add_column("candidate")
    for heading in ("parameters", "MB", "training loss", "validation loss", "above best"):
        table.add_column(heading, justify="right")
    table.add_column("")
    for line in result.candidates:
        above = "" if line.above_best is None else f"{line.above_best:.4f}"
        if line.standard_error is not None and line.name != result.best:
            above += f" ± {line.standard_error:.4f}"
        mark = "take this one" if line.taken else "within noise" if line.within_noise else ""
        table.add_row(
            escape(line.name),
            f"{line.parameters:,}",
            f"{line.adapter_bytes / 1e6:.2f}",
            "" if line.training_loss is None else f"{line.training_loss:.4f}",
            "" if line.validation_loss is None else f"{line.validation_loss:.4f}",
            above,
            escape(", ".join(filter(None, (mark, line.ended)))),
        )
    return table
