"""``loraport inspect``."""

from __future__ import annotations

import json
from pathlib import Path

import click


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("--base", help="The base model, for adapter formats that need its names.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def inspect(path: Path, base: str | None, as_json: bool) -> None:
    """Say what PATH is: an adapter, a checkpoint, an .onnx file or a bundle."""
    from loraport.cli.descriptions import describe
    from loraport.cli.reports import print_description

    description = describe(path, base)
    if as_json:
        click.echo(json.dumps(description.to_json(), indent=1))
    else:
        print_description(description)
