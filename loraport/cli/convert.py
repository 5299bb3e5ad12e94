"""``loraport convert``: one adapter, another format."""

from __future__ import annotations

from pathlib import Path

import click

from converters.formats.registry import adapter_formats, read_adapter, write_adapter
from loraport.counts import counted
from loraport.output import refuse_existing


@click.command()
@click.argument("adapter", type=click.Path(path_type=Path))
@click.option(
    "--to",
    "format_name",
    required=True,
    type=click.Choice(list(adapter_formats())),
    help="The format to write.",
)
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Where to.")
@click.option(
    "--base",
    help="The base model (directory, .gguf, hub name), for formats that need its names or "
    "head counts.",
)
@click.option(
    "--initial-adapter",
    type=click.Path(path_type=Path),
    help="The adapter before training, for PiSSA, OLoRA, CorDA and LoRA-GA.",
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
def convert(
    adapter: Path,
    format_name: str,
    output: Path,
    base: str | None,
    initial_adapter: Path | None,
    force: bool,
) -> None:
    """Write ADAPTER, whatever its format, in another format.

    The input's format is told from its content. Tensors are carried over exactly, or with B
    rounded once where the format has no other place for the scale. What the format cannot hold
    is refused, never dropped.
    """
    refuse_existing(output, force=force, inputs=(adapter, base, initial_adapter))
    read = read_adapter(adapter, base=base, initial_adapter=initial_adapter)
    copies = write_adapter(read, output, format_name, base=base, force=force)
    for name in copies:
        click.echo(f"{name}: left out, it equals the base's own", err=True)
    click.echo(f"{output}: {counted(len(read.modules), 'module')} as {format_name}", err=True)
