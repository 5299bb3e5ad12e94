"""``loraport extract``: a full fine-tune as an adapter."""

from __future__ import annotations

from pathlib import Path

import click

from loraport.cli.byte_progress import ByteProgress


@click.command()
@click.argument("base")
@click.argument("tuned")
@click.option("--rank", type=click.IntRange(min=1), help="Rank of every module.")
@click.option("--energy", type=float, help="Or the share of each difference's energy to keep.")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Where to.")
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print the errors as JSON.")
def extract(
    base: str,
    tuned: str,
    rank: int | None,
    energy: float | None,
    output: Path,
    force: bool,
    as_json: bool,
) -> None:
    """Write what TUNED changed in BASE as an adapter, so that it can be swapped like one.

    Weights are factored by a truncated SVD and the relative error of each is reported; norms
    and biases that changed are stored whole, exactly.
    """
    from converters.extract import ExtractOptions
    from converters.extract import extract as run
    from loraport.cli.error_table import show_errors
    from loraport.output import refuse_existing
    from loraport.peft_layout import write_peft

    if (rank is None) == (energy is None):
        raise click.UsageError("expected either --rank or --energy")
    refuse_existing(output, force=force, inputs=(base, tuned))
    with ByteProgress("comparing") as progress:
        extracted = run(ExtractOptions(base, tuned, rank, energy), progress)
    for note in extracted.notes:
        click.echo(note, err=True)
    write_peft(extracted.adapter, output, force=force)
    show_errors(output, extracted.adapter, extracted.errors, as_json=as_json)
