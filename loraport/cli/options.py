"""Option types and printing that several commands share."""

from __future__ import annotations

import sys
from pathlib import Path

import click
from rich.console import Console

from loraport.errors import LoraportError

# Data goes to stdout, everything else here. What a program reads has a line for each message.
# Names are printed as they are: "[bold]" and ":cat:" in a path are no markup.
log = Console(
    stderr=True,
    highlight=False,
    markup=False,
    emoji=False,
    soft_wrap=not (sys.stderr and sys.stderr.isatty()),
)


def progress(text: str) -> None:
    """Tell what is being done."""
    log.print(f"· {text}", style="dim")


def named_paths(values: tuple[str, ...], what: str) -> dict[str, Path]:
    """Read ``NAME=PATH`` options.

    Raises:
        click.BadParameter: If one has another form, or a name comes twice.
    """
    found: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or not name or not path:
            raise click.BadParameter(f"{what}: expected NAME=PATH, got {value!r}")
        if name in found:
            raise click.BadParameter(f"{what}: {name!r} is given twice")
        found[name] = Path(path)
    return found


def strengths(values: tuple[str, ...]) -> dict[str, float]:
    """Read ``NAME`` or ``NAME=STRENGTH`` options.

    Raises:
        LoraportError: If a strength is no finite number or a name comes twice.
    """
    found: dict[str, float] = {}
    for value in values:
        name, equals, number = value.rpartition("=")
        try:
            strength = float(number) if equals else 1.0
        except ValueError:
            strength = float("nan")
        if strength != strength or abs(strength) == float("inf"):
            raise LoraportError(f"--adapter {value}: expected NAME or NAME=STRENGTH, a number")
        name = name if equals else value
        if name in found:
            raise LoraportError(f"--adapter {name}: expected each adapter once, got it twice")
        found[name] = strength
    return found
