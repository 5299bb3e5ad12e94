"""``loraport add``."""

from __future__ import annotations

from pathlib import Path

import click

from loraport.cli.options import log, named_paths, progress
from loraport.cli.sizes import size_text


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("adapters", nargs=-1, required=True, metavar="NAME=ADAPTER...")
@click.option("--force", is_flag=True, help="Replace adapters that are already there.")
@click.option("--ignore-fingerprint", is_flag=True, help="Accept adapters made for another base.")
@click.option(
    "--base",
    help="The model the bundle was exported from, for what depends on it (DoRA, trained tokens and "
    "biases), if it moved.",
)
def add(
    bundle: Path,
    adapters: tuple[str, ...],
    force: bool,
    ignore_fingerprint: bool,
    base: str | None,
) -> None:
    """Pack adapters into BUNDLE; nothing is exported again."""
    from converters.formats.registry import read_adapter
    from converters.onnx.packing.adding import add_adapters
    from loraport.bundle.sources import record_adapter

    paths = named_paths(adapters, "adapter")
    manifest = add_adapters(
        bundle,
        {name: read_adapter(path) for name, path in paths.items()},
        force=force,
        ignore_fingerprint=ignore_fingerprint,
        base=base,
        progress=progress,
    )
    for name, path in paths.items():
        record_adapter(bundle, name, str(path.resolve()))
        ranks = sorted(set(manifest.adapters[name].ranks.values()))
        size = (bundle / manifest.adapters[name].file).stat().st_size
        log.print(f"{name}: slot ranks {ranks}, {size_text(size)}")
