"""``loraport train``."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from loraport.cli.options import log
from loraport.training.options import ALL_LINEAR, LoopOptions, LoraOptions, TrainOptions

# Defaults are declared once, in the options.
_LORA, _LOOP, _TRAIN = LoraOptions(), LoopOptions(), TrainOptions()
_NAMES = re.compile(r"[\w.-]+(\s*,\s*[\w.-]+)*")


def _names_or_regex(
    ctx: click.Context, param: click.Parameter, value: str
) -> tuple[str, ...] | str:
    """Tell names separated by commas from a regular expression by what a name is made of."""
    del ctx, param
    if not value:
        return ()
    is_names = value != ALL_LINEAR and _NAMES.fullmatch(value)
    return tuple(re.split(r"\s*,\s*", value)) if is_names else value


def _pattern(
    ctx: click.Context, param: click.Parameter, values: tuple[str, ...]
) -> dict[str, float]:
    """Read ``NAME=NUMBER``, split at the last equals sign."""
    number = int if param.name == "rank_pattern" else float
    pattern: dict[str, float] = {}
    for value in values:
        name, _, text = value.rpartition("=")
        try:
            pattern[name] = number(text)
        except ValueError:
            name = ""
        if not name:
            raise click.BadParameter(f"expected NAME=NUMBER, got {value!r}", ctx, param)
    return pattern


@click.command(context_settings={"show_default": True})
@click.argument("base")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), metavar="ADAPTER",
              help="Adapter directory to write.")  # fmt: skip
@click.option("--validation", type=click.Path(path_type=Path), help="Held-out rows (JSONL).")
@click.option("--validation-share", type=float, default=_TRAIN.validation_share,
              help="Share of DATA held out where --validation is not given.")  # fmt: skip
@click.option("--rank", type=int, default=_LORA.rank, help="LoRA rank.")
@click.option("--alpha", type=float, help="LoRA alpha; twice the rank unless given.")
@click.option("--rslora", "use_rslora", is_flag=True, help="Scale by alpha / sqrt(rank).")
@click.option("--dropout", type=float, default=_LORA.dropout, help="LoRA dropout.")
@click.option("--targets", default=_LORA.targets, callback=_names_or_regex,
              help="all-linear, module names separated by commas, or a regular expression "
              "that matches whole module paths.")  # fmt: skip
@click.option("--exclude", default="", callback=_names_or_regex, show_default=False,
              help="Names or a regular expression of modules to leave alone.")  # fmt: skip
@click.option("--layers", default=_LORA.layers, show_default=False,
              help="Layer numbers to adapt, like 0-3,8.")  # fmt: skip
@click.option("--rank-pattern", multiple=True, callback=_pattern,
              help="Another rank for some modules, like v_proj=4; repeatable.")  # fmt: skip
@click.option("--alpha-pattern", multiple=True, callback=_pattern,
              help="Another alpha for some modules; repeatable.")  # fmt: skip
@click.option("--dora", "use_dora", is_flag=True, help="Train magnitudes too (DoRA).")
@click.option("--init", type=click.Choice(["kaiming", "gaussian", "pissa", "olora"]),
              default=_LORA.init,
              help="How A begins: drawn, or from the base (doubles the adapter).")  # fmt: skip
@click.option("--lr", "learning_rate", type=float, default=_LOOP.learning_rate,
              help="Peak learning rate. Try 1e-3 to 5e-3: LoRA's best rate is about ten times "
              "that of full fine-tuning.")  # fmt: skip
@click.option("--lora-plus-ratio", type=float, default=_LOOP.lora_plus_ratio,
              help="LoRA+: learning rate of B over that of A, on embeddings too; try 16, --lr "
              "lower.")  # fmt: skip
@click.option("--epochs", type=int, default=_LOOP.epochs, help="Passes over the data.")
@click.option("--steps", type=int, help="Optimizer steps, instead of --epochs.")
@click.option("--batch-size", type=int, default=_TRAIN.batch_size, help="Rows per batch.")
@click.option("--accumulate", type=int, default=_LOOP.accumulate, help="Batches per step.")
@click.option("--max-length", type=int, default=_TRAIN.max_length, help="Tokens per row.")
@click.option("--packing", type=click.Choice(["auto", "fill", "none"]), default=_TRAIN.packing,
              help="auto: rows of a batch end to end where that is less work, with equal results; "
              "fill: sequences packed up to --max-length; none: padded.")  # fmt: skip
@click.option("--warmup", type=float, default=_LOOP.warmup,
              help="Share of the steps in which the learning rate rises.")  # fmt: skip
@click.option("--weight-decay", type=float, default=_LOOP.weight_decay, help="AdamW's decay.")
@click.option("--optimizer", default=_LOOP.optimizer,
              type=click.Choice(["adamw", "adamw-8bit", "paged-adamw-8bit"]),
              help="State in float32, or in 8 bits (bitsandbytes).")  # fmt: skip
@click.option("--clip", type=float, default=_LOOP.clip, help="Largest gradient norm; 0 for none.")
@click.option("--shard-base", is_flag=True,
              help="With torchrun: spread the base over the processes (FSDP2).")  # fmt: skip
@click.option("--gradient-checkpointing", is_flag=True, help="Save memory, take longer.")
@click.option("--checkpointed-layers", type=int, metavar="N",
              help="With it: only the first N layers, to save time.")  # fmt: skip
@click.option("--compile", is_flag=True,
              help="Compile the layers, which takes a minute or so; meant for GPUs, on CPUs it "
              "hardly pays. --resume then continues but for the order of sums.")  # fmt: skip
@click.option("--cuda-graphs/--no-cuda-graphs", default=None,
              show_default="where it works and memory is left",
              help="On a GPU: record the passes of each shape of batch, which are then launched "
              "at once; a small model takes a fraction of the time.")  # fmt: skip
@click.option("--liger-kernel", is_flag=True,
              help="On a GPU: norms, rotations and gates by liger-kernel's kernels.")  # fmt: skip
@click.option("--seed", type=int, default=_LOOP.seed, help="Seed of everything random.")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default=_LOOP.dtype,
              help="auto: bfloat16 autocast on GPUs that have it, else float32.")  # fmt: skip
@click.option("--base-dtype", default=_TRAIN.base_dtype,
              type=click.Choice(["auto", "float32", "bfloat16", "nf4", "int8"]),
              help="What the frozen base is kept in; nf4 and int8 need bitsandbytes.")  # fmt: skip
@click.option("--device", default=_LOOP.device, help="auto, cpu, cuda, cuda:1, ...")
@click.option("--save-every", type=int, default=_LOOP.save_every,
              help="Steps between checkpoints; 0 for none.")  # fmt: skip
@click.option("--keep", type=int, default=_LOOP.keep, help="Checkpoints kept.")
@click.option("--validate-every", type=int, default=_LOOP.validate_every,
              help="Steps between validations; 0 for every epoch.")  # fmt: skip
@click.option("--early-stopping", type=int, default=_LOOP.early_stopping, metavar="PATIENCE",
              help="Stop after so many validations without a new best, and keep the best; 0 for "
              "never.")  # fmt: skip
@click.option("--resume", is_flag=True, help="Continue a run that was stopped, exactly.")
@click.option("--force", is_flag=True, help="Replace ADAPTER; discard an unfinished run.")
@click.option("--dry-run", is_flag=True,
              help="Predict the memory a run takes and what would make it fit.")  # fmt: skip
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
@click.option("--quiet", is_flag=True, help="No progress, no table.")
def train(
    base: str,
    data: Path,
    out: Path | None,
    validation: Path | None,
    resume: bool,
    force: bool,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    **chosen: Any,
) -> None:
    """Train a LoRA adapter for BASE on the rows of DATA (JSONL).

    BASE is a model directory, a .gguf file, a hub name (owner/name) or smollm2. A row is
    {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}; of the last two,
    only the completion or the assistant's turns are learned, but not a turn with "weight": 0.
    "tools" beside "messages" are given to the chat template.

    While it runs, checkpoints are kept in ADAPTER.training. Ctrl-C, SIGTERM or a closed
    terminal (SIGHUP) ends the run after the present step with one more checkpoint, and --resume
    continues it exactly.

    On several GPUs or machines: torchrun --nproc-per-node N -m loraport train ... A step takes
    --batch-size x --accumulate rows in all, whatever the number of processes, so the adapter is
    the same, and any number of processes can continue a run, with --gradient-checkpointing or
    without.
    """
    if dry_run:
        _dry_run(base, data, options_from(chosen), as_json=as_json)
        return
    if out is None:
        raise click.MissingParameter(param_hint="-o / --out", param_type="option")
    from transformers.utils import logging

    from loraport.cli.reports import table_console
    from loraport.training import train_language_model
    from loraport.training.distributed.processes import joined
    from loraport.training.report import ProgressReport, summary_table
    from loraport.training.run.interruption import Stopped

    logging.disable_progress_bar()
    try:
        with joined(chosen["device"]) as processes:
            summary = train_language_model(
                base,
                data,
                out,
                options_from(chosen),
                validation=validation,
                resume=resume,
                force=force,
                observer=None if quiet else ProgressReport(log),
            )
    except Stopped:
        click.echo("continue with the same command and --resume", err=True)
        raise
    if not processes.first:
        return
    if as_json:
        click.echo(json.dumps(asdict(summary), indent=2))
    elif not quiet:
        table_console().print(summary_table(summary))


def _dry_run(base: str, data: Path, options: TrainOptions, *, as_json: bool) -> None:
    from loraport.cli.reports import table_console
    from loraport.errors import LoraportError
    from loraport.training.distributed.processes import joined
    from loraport.training.memory.dry_run import dry_run
    from loraport.training.report import memory_table

    if not data.is_file():
        raise LoraportError(f"{data}: expected a file of rows (JSONL), got none")
    with joined(options.loop.device) as processes:
        found = dry_run(base, options)
    if not processes.first:
        return
    if found.note is not None:
        click.echo(f"note: {found.note}", err=True)
    if as_json:
        totals = {flags: made.total for flags, made in found.alternatives.items()}
        document = asdict(found) | {
            "total": found.prediction.total,
            "fits": found.fits,
            "alternatives": totals,
        }
        click.echo(json.dumps(document, indent=2))
    else:
        table_console().print(memory_table(found))


def options_from(chosen: dict[str, Any]) -> TrainOptions:
    """Sort the command line's values into the options they belong to.

    ``--seed`` seeds both the matrices and the loop.

    Raises:
        LoraportError: If a value is out of its range.
    """
    chosen = dict(chosen)
    seed = chosen.pop("seed")
    lora = {name: chosen.pop(name) for name in _fields(LoraOptions) & chosen.keys()}
    loop = {name: chosen.pop(name) for name in _fields(LoopOptions) & chosen.keys()}
    return TrainOptions(
        lora=LoraOptions(seed=seed, **lora), loop=LoopOptions(seed=seed, **loop), **chosen
    )


def _fields(options: type) -> set[str]:
    return set(options.__dataclass_fields__)  # type: ignore[attr-defined]
