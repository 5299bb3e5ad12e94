"""Commands that share no work: of the processes that ``torchrun`` started, the first runs them."""

from __future__ import annotations

import os

import click

SHARING = ("train",)  # commands whose work several processes share


def leave_to_the_first(command: str | None) -> None:
    """End this process where another one of ``torchrun``'s runs the command, which shares no work.

    Otherwise all would do the same, print it and write the same output. Only ``torchrun`` (or what
    uses it, like ``accelerate launch``) sets ``TORCHELASTIC_RUN_ID``: clusters set a rank and a
    number of machines for whatever is typed there, too.

    Args:
        command: Its name; ``None`` for none.

    Raises:
        click.exceptions.Exit: With 0, in all processes but the first.
    """
    size = os.environ.get("WORLD_SIZE", "1")
    if command in (None, *SHARING) or size == "1" or "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    first = f"the first of {size} processes that torchrun started"
    if os.environ.get("RANK", "0") != "0":
        click.echo(f"note: loraport {command} is left to {first}: this one ends", err=True)
        raise click.exceptions.Exit(0)
    click.echo(f"note: loraport {command} is done by {first}; the others end", err=True)
