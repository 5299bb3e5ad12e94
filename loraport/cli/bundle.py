"""``loraport bundle``: check, pack, unpack, diff."""

from __future__ import annotations

from pathlib import Path

import click

from loraport.cli.options import log, progress
from loraport.cli.sizes import size_text
from loraport.counts import counted

_BUNDLE = click.Path(path_type=Path)


@click.group()
def bundle() -> None:
    """Check bundles, and pack them for shipping."""


@bundle.command()
@click.argument("directory", metavar="BUNDLE", type=_BUNDLE)
def check(directory: Path) -> None:
    """Check BUNDLE's manifest, file hashes and golden outputs on this machine."""
    from loraport.cli.reports import print_golden
    from loraport.runtime.replay import replay_golden

    replayed = replay_golden(directory)
    print_golden(replayed)
    if not all(case.passed for case in replayed):
        raise SystemExit(1)


@bundle.command()
@click.argument("directory", metavar="BUNDLE", type=_BUNDLE)
@click.option("-o", "--output", required=True, type=_BUNDLE, help="The archive, e.g. bundle.zip.")
@click.option("--force", is_flag=True, help="Replace an existing archive.")
def pack(directory: Path, output: Path, force: bool) -> None:
    """Write BUNDLE as one file (a zip, stored)."""
    from loraport.bundle.archive import pack_bundle

    count = pack_bundle(directory, output, force=force, progress=progress)
    log.print(f"{output}: {counted(count, 'file')}, {size_text(output.stat().st_size)}")


@bundle.command()
@click.argument("archive", type=_BUNDLE)
@click.option("-o", "--output", required=True, type=_BUNDLE, help="The new bundle.")
@click.option("--onto", type=_BUNDLE, help="For a delta: the bundle that has the rest.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
def unpack(archive: Path, output: Path, onto: Path | None, force: bool) -> None:
    """Turn ARCHIVE, whole or a delta, into a bundle; everything is checked."""
    from loraport.bundle.archive import unpack_bundle
    from loraport.output import refuse_existing

    refuse_existing(output, force=force, inputs=(archive,))
    manifest = unpack_bundle(archive, output, onto=onto, force=force, progress=progress)
    count = len(manifest.files) + 1  # the manifest itself
    log.print(
        f"{output}: {counted(count, 'file')}, adapters: {', '.join(manifest.adapters) or 'none'}"
    )


@bundle.command()
@click.argument("old", type=_BUNDLE)
@click.argument("new", type=_BUNDLE)
@click.option("-o", "--output", type=_BUNDLE, help="Write a delta archive; else only list.")
@click.option("--force", is_flag=True, help="Replace an existing archive.")
def diff(old: Path, new: Path, output: Path | None, force: bool) -> None:
    """List what NEW has beyond OLD, or write it as a delta for devices that have OLD."""
    from loraport.bundle.archive import pack_bundle
    from loraport.bundle.manifest import read_manifest

    before, after = read_manifest(old).files, read_manifest(new).files
    for path, digest in after.items():
        if before.get(path) != digest:
            size = (new / path).stat().st_size
            click.echo(f"{'changed' if path in before else 'new':8} {size:>12} {path}")
    for path in before.keys() - after.keys():
        click.echo(f"{'gone':8} {'':>12} {path}")
    if output is not None:
        count = pack_bundle(new, output, without=old, force=force)
        log.print(f"{output}: {counted(count, 'file')}, {size_text(output.stat().st_size)}")
