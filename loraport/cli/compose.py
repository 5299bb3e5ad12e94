"""``loraport compose``: several adapters as one."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("adapters", nargs=-1, required=True, metavar="ADAPTER[=WEIGHT]...")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="Where to.")
@click.option("--rank", type=click.IntRange(min=1), help="Reduce the sum to this rank.")
@click.option("--energy", type=click.FloatRange(0, 1, min_open=True), help="Or to this energy.")
@click.option(
    "--base",
    help="The base model, to leave out copies of its weights that PEFT saves with embeddings, and "
    "for formats that need its names.",
)
@click.option("--force", is_flag=True, help="Replace an existing output.")
@click.option("--json", "as_json", is_flag=True, help="Print ranks and errors as JSON.")
def compose(
    adapters: tuple[str, ...],
    output: Path,
    rank: int | None,
    energy: float | None,
    base: str | None,
    force: bool,
    as_json: bool,
) -> None:
    """Write the weighted sum of ADAPTERs as one adapter.

    Ranks are laid side by side, which is exact: no cross terms arise. With --rank or --energy
    the sum is reduced by a singular value decomposition and the error of each module reported.
    """
    from converters.compose import compose as add_up
    from converters.formats.base_copies import without_base_copies
    from converters.formats.registry import read_adapter
    from loraport.base.finding import resolve_base
    from loraport.cli.error_table import show_errors
    from loraport.cli.merge import parse_strength
    from loraport.output import refuse_existing
    from loraport.peft_layout import write_peft

    if rank is not None and energy is not None:
        raise click.UsageError("expected --rank or --energy, not both")
    pairs = [parse_strength(text) for text in adapters]
    refuse_existing(output, force=force, inputs=(base, *(path for path, _ in pairs)))
    weighted = [(str(path), read_adapter(path, base=base), weight) for path, weight in pairs]
    if base is not None:
        directory = resolve_base(base)
        weighted = [
            (name, without_base_copies(adapter, directory)[0], weight)
            for name, adapter, weight in weighted
        ]
    composed = add_up(weighted, rank, energy)
    write_peft(composed.adapter, output, force=force)
    show_errors(output, composed.adapter, composed.errors, as_json=as_json)
