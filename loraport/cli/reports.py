"""Tables for people."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from loraport.errors import first_names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from loraport.cli.descriptions import Description
    from loraport.parity import Verification
    from loraport.runtime.replay import GoldenResult

_PIPED_WIDTH = 150


def print_verification(report: Verification) -> None:
    """Print a verification's checks on stdout."""
    table = Table(
        title=f"parity over {report.samples} inputs, {report.provider}, "
        f"max abs ≤ {report.tolerance.max_abs:g} ({report.tolerance.reason})"
    )
    table.add_column("check", overflow="fold")
    for heading in ("max abs", "relative", "KL", "top-1"):
        table.add_column(heading, justify="right")
    table.add_column("", overflow="fold")
    for check in report.checks:
        found = check.comparison
        numbers = ("", "", "", "")
        if found is not None:
            numbers = (
                f"{found.max_abs:.2e}",
                f"{found.relative:.2e}",
                f"{found.kl:.2e}",
                f"{100 * found.top1:.2f} %",
            )
        verdict = "[green]ok[/green]" if check.passed else "[red]FAILED[/red]"
        table.add_row(escape(check.name), *numbers, f"{verdict} {escape(check.detail)}".rstrip())
    table_console().print(table)


def table_console() -> Console:
    """Return a console for tables on stdout; piped into a file there is no window to fit."""
    console = Console(emoji=False)
    return console if console.is_terminal else Console(width=_PIPED_WIDTH, emoji=False)


def print_description(description: Description) -> None:
    """Print what ``loraport inspect`` found on stdout."""
    console = table_console()
    facts = Table(title=description.kind, show_header=False, title_justify="left")
    facts.add_column(style="bold")
    facts.add_column(overflow="fold")
    for name, value in description.facts.items():
        text = first_names(value) if isinstance(value, tuple) else str(value)
        facts.add_row(name, escape(text))
    console.print(facts)
    if not description.rows:
        return
    table = Table()
    for heading in description.headings:
        table.add_column(heading, overflow="fold")
    for row in description.rows:
        table.add_row(*map(escape, row))
    console.print(table)


def print_golden(results: Sequence[GoldenResult]) -> None:
    """Print replayed golden cases on stdout."""
    table = Table()
    for heading in ("golden case", "max abs", "tolerance", ""):
        table.add_column(heading, justify="left" if heading == "golden case" else "right")
    for result in results:
        verdict = "[green]ok[/green]" if result.passed else "[red]FAILED[/red]"
        if not result.swapped:
            verdict += ": changes the base otherwise than its golden outputs do"
        numbers = (f"{result.max_abs:.2e}", f"{result.tolerance:g}")
        table.add_row(escape(result.name), *numbers, verdict)
    table_console().print(table)
