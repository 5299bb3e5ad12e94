"""Errors per module, as a table or as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import click

from loraport.adapter import Adapter
from loraport.cli.sizes import size_text
from loraport.counts import counted


def show_errors(
    output: Path, adapter: Adapter, errors: Mapping[str, float], *, as_json: bool
) -> None:
    """Print the rank and relative error of every module on stdout, worst first.

    Args:
        output: Where the adapter was written.
        adapter: What was written.
        errors: Module → relative error of its update; modules that are missing are exact.
        as_json: As JSON rather than as a table.
    """
    if as_json:
        modules = {
            path: {"rank": module.rank, "relative_error": errors.get(path, 0.0)}
            for path, module in adapter.modules.items()
        }
        document = {
            "output": str(output),
            "modules": modules,
            "replaced": sorted(adapter.replacements),
            "bytes": adapter.nbytes,
        }
        click.echo(json.dumps(document, indent=2))
        return
    if errors:
        width = max(len(path) for path in errors)
        click.echo(f"{'module':{width}}  rank  relative error")
        for path, error in sorted(errors.items(), key=lambda item: -item[1]):
            click.echo(f"{path:{width}}  {adapter.modules[path].rank:4}  {error:.3e}")
    click.echo(
        f"{output}: {counted(len(adapter.modules), 'module')}, "
        f"{counted(len(adapter.replacements), 'replaced parameter')}, {size_text(adapter.nbytes)}",
        err=True,
    )
