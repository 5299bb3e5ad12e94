"""``loraport merge``: adapters into a checkpoint, streamed and exact."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraport.cli.byte_progress import ByteProgress
from loraport.cli.sizes import size_text
from loraport.counts import counted
from loraport.errors import LoraportError

if TYPE_CHECKING:
    from converters.merge import MergePlan


def parse_strength(text: str) -> tuple[Path, float]:
    """Read ``ADAPTER`` or ``ADAPTER=STRENGTH``; a path may itself contain ``=``.

    Raises:
        LoraportError: If the strength is no finite number.
    """
    path, equals, number = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), 1.0
    try:
        strength = float(number)
    except ValueError:
        strength = math.nan
    if not math.isfinite(strength):
        raise LoraportError(f"{text}: expected ADAPTER or ADAPTER=STRENGTH, a number")
    return Path(path), strength


@click.command()
@click.argument("base")
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=STRENGTH]...")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The new model directory.")
@click.option("--dry-run", is_flag=True, help="Only list what would change.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option(
    "--ignore-fingerprint",
    is_flag=True,
    help="Merge into a base other than the one the adapter was trained on.",
)
@click.option(
    "--initial-adapter",
    type=click.Path(path_type=Path),
    help="The adapter before training, for PiSSA, OLoRA, CorDA and LoRA-GA.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Default: as many as cores.")
@click.option("--json", "as_json", is_flag=True, help="Print what changed as JSON.")
def merge(
    base: str,
    adapters: tuple[str, ...],
    output: Path | None,
    dry_run: bool,
    force: bool,
    ignore_fingerprint: bool,
    initial_adapter: Path | None,
    threads: int | None,
    as_json: bool,
) -> None:
    """Merge one or more adapters into BASE, whatever its size.

    Tensors stream by one block at a time; those that no adapter touches are copied byte for
    byte, or dequantized where BASE is quantized. Every changed element is computed in float64
    and rounded once. Several adapters are added up exactly, in one pass.
    """
    from converters.merge import MergeOptions, make_plan
    from converters.merge import merge as write_merge

    if output is None and not dry_run:
        raise click.UsageError("expected -o OUTPUT, or --dry-run")
    options = MergeOptions(
        base=base,
        adapters=tuple(parse_strength(text) for text in adapters),
        output=output,
        force=force,
        ignore_fingerprint=ignore_fingerprint,
        initial_adapter=initial_adapter,
        threads=threads,
    )
    plan = make_plan(options)
    for note in plan.notes:
        click.echo(note, err=True)
    if not dry_run:
        with ByteProgress("merging", plan.nbytes) as progress:
            write_merge(options, plan, progress)
    _report(plan, None if dry_run else output, as_json=as_json)


def _report(plan: MergePlan, output: Path | None, *, as_json: bool) -> None:
    changed = [tensor for tensor in plan.tensors if tensor.changed]
    copied = sum(tensor.copied for tensor in plan.tensors)
    dequantized = len(plan.tensors) - len(changed) - copied
    if as_json:
        document = {
            "output": None if output is None else str(output),
            "bytes": plan.nbytes,
            "copied": copied,
            "dequantized": dequantized,
            "changed": [
                {"tensor": tensor.name, "dtype": tensor.dtype, "shape": list(tensor.shape)}
                for tensor in changed
            ],
            "config_changed": plan.config is not None,
            "notes": list(plan.notes),
        }
        click.echo(json.dumps(document, indent=2))
        return
    if output is None:
        for tensor in changed:
            click.echo(f"{tensor.name}  {tensor.dtype} {list(tensor.shape)}")
    text = f"{counted(len(changed), 'tensor')} changed, {copied} copied, "
    text += f"{dequantized} dequantized, " if dequantized else ""
    text += size_text(plan.nbytes)
    click.echo(text if output is None else f"{output}: {text}", err=True)
