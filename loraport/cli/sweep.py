"""``loraport sweep``."""

from __future__ import annotations

import json
import sys
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from loraport.cli.options import log
from loraport.cli.train import _names_or_regex, options_from
from loraport.cli.train import train as train_command

# Options of `loraport train` that all candidates share.
_SHARED = (
    *("validation_share", "use_rslora", "dropout", "exclude", "use_dora", "init"),
    *("lora_plus_ratio", "epochs", "steps", "batch_size", "accumulate", "max_length", "packing"),
    *("warmup", "weight_decay", "clip", "gradient_checkpointing", "cuda_graphs", "seed"),
    *("dtype", "device"),
    *("save_every", "keep", "validate_every", "early_stopping"),
)


def _numbers(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float, ...]:
    number = int if param.name == "rank" else float
    found: list[float] = []
    for text in value.split(","):
        try:
            found.append(number(text))
        except ValueError:
            message = f"expected numbers separated by commas, got {value!r}"
            raise click.BadParameter(message, ctx, param) from None
    return tuple(found)


def _alphas(ctx: click.Context, param: click.Parameter, value: str) -> tuple[float | str, ...]:
    found: list[float | str] = []
    for text in (part.strip() for part in value.split(",")):
        try:
            found.append(text if text.endswith("r") else float(text))
        except ValueError:
            message = f"expected numbers, or some times the rank like 2r, got {value!r}"
            raise click.BadParameter(message, ctx, param) from None
    return tuple(found)


def _choices(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> tuple[tuple[str, ...] | str, ...]:
    return tuple(_names_or_regex(ctx, param, value) for value in values)


@click.command(context_settings={"show_default": True})
@click.argument("base")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("-o", "--out", required=True, type=click.Path(path_type=Path), metavar="DIR",
              help="Directory to write: adapter, table, plot.")  # fmt: skip
@click.option("--rank", default="4,8,16", callback=_numbers, help="Ranks to try.")
@click.option("--alpha", default="2r", callback=_alphas,
              help="Alphas to try: numbers, or some times the rank like 2r.")  # fmt: skip
@click.option("--targets", multiple=True, default=("all-linear",), callback=_choices,
              help="As for train; repeat it to try several.")  # fmt: skip
@click.option("--layers", multiple=True, default=("",), show_default=False,
              help="Layer numbers to adapt, like 0-3,8; repeat it to try several.")  # fmt: skip
@click.option("--lr", "--learning-rate", "learning_rate", default="1e-3,3e-3", callback=_numbers,
              help="Peak learning rates to try.")  # fmt: skip
@click.option("--validation", type=click.Path(path_type=Path), help="Held-out rows (JSONL).")
@click.option("--together", type=int, show_default="16; on a CPU, as many as make it faster",
              help="Most candidates in one pass; halved where memory runs out.")  # fmt: skip
@click.option("--apart", is_flag=True, help="Train each by itself: --together 1.")
@click.option("--halving", type=int, default=0, metavar="N",
              help="Give up the worse half of the candidates N times: with 3 after 1/8, 1/4 and "
                   "1/2 of the steps.")  # fmt: skip
@click.option("--ray", "address", metavar="ADDRESS",
              help="Spread the sweep over a Ray cluster: its address, auto, or local.")  # fmt: skip
@click.option("--workers", type=int, show_default="one on every GPU, or machine",
              help="With --ray: processes, each with the base in memory.")  # fmt: skip
@click.option("--keep-all", is_flag=True, help="Keep the adapters of all candidates.")
@click.option("--resume", is_flag=True, help="Continue a sweep that was stopped.")
@click.option("--force", is_flag=True, help="Replace DIR; discard an unfinished sweep.")
@click.option("--json", "as_json", is_flag=True, help="Print the results as JSON.")
def sweep(
    base: str,
    data: Path,
    out: Path,
    rank: tuple[int, ...],
    alpha: tuple[float | str, ...],
    targets: tuple[tuple[str, ...] | str, ...],
    layers: tuple[str, ...],
    learning_rate: tuple[float, ...],
    validation: Path | None,
    together: int | None,
    apart: bool,
    halving: int,
    address: str | None,
    workers: int | None,
    keep_all: bool,
    resume: bool,
    force: bool,
    as_json: bool,
    **chosen: Any,
) -> None:
    """Try ranks, targets, alphas and learning rates on BASE, and say which to take.

    Every combination is a candidate. Candidates train together on one frozen base; each learns
    what it would learn alone. With --halving those that fall behind are given up early. DIR gets
    the adapter to take (PEFT layout), results.json, results.csv and quality.png/.svg.

    The one with the lowest validation loss is the best. Taken is the smallest whose loss is
    higher by no more than one standard error of the difference on the same validation rows.
    """
    from transformers.utils import logging

    from loraport.cli.reports import table_console
    from loraport.sweep.grid import Grid
    from loraport.sweep.options import Spread, SweepOptions
    from loraport.sweep.report import SweepReport, results_table
    from loraport.sweep.run import run_sweep

    if workers is not None and address is None:
        raise click.UsageError("--workers is for --ray; give --ray local to use this machine alone")
    logging.disable_progress_bar()
    options = SweepOptions(
        grid=Grid(rank, alpha, targets, layers, learning_rate),
        train=options_from(chosen),
        together=1 if apart else together,
        halving=halving,
        keep_all=keep_all,
        spread=None if address is None else Spread(address, workers),
    )
    report = SweepReport(log)
    # Ray prints what its machines report; data alone goes to stdout.
    with redirect_stdout(sys.stderr):
        result = run_sweep(
            base,
            data,
            out,
            options,
            validation=validation,
            resume=resume,
            force=force,
            observer=report,
        )
    if as_json:
        click.echo(json.dumps(asdict(result), indent=2))
        return
    table_console().print(results_table(result))
    click.echo(f"take {result.taken}: {result.reason}")


sweep.params += [param for param in train_command.params if param.name in _SHARED]
