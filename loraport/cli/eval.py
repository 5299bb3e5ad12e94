"""``loraport eval``."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraport.cli.options import log, progress
from loraport.cli.share_line import ShareLine
from loraport.cli.visible import visible
from loraport.counts import counted
from loraport.errors import LoraportError

if TYPE_CHECKING:
    from loraport.evaluation import Evaluation
    from loraport.training.data.tokens import Rows


@click.command("eval")
@click.argument("base")
@click.argument("data", type=click.Path(path_type=Path))
@click.option("--adapter", "adapters", multiple=True, metavar="[NAME=]ADAPTER",
              help="An adapter in any format; repeatable.")  # fmt: skip
@click.option("--held-out", type=click.Path(path_type=Path), metavar="TEXT",
              help="A text file that adapters should not make worse; a small neutral text "
              "unless given.")  # fmt: skip
@click.option("--generations", type=click.IntRange(min=0), default=100, show_default=True,
              help="Rows whose answer is generated and compared.")  # fmt: skip
@click.option("--examples", type=click.IntRange(min=0), default=0, show_default=True,
              help="Answers shown.")  # fmt: skip
@click.option("--per-example", type=click.Path(path_type=Path), metavar="FILE.jsonl",
              help="Write every row's scores and answers.")  # fmt: skip
@click.option("--batch-size", type=click.IntRange(min=1), default=4, show_default=True)
@click.option("--max-length", type=click.IntRange(min=2), default=1024, show_default=True)
@click.option("--device", default="auto", show_default=True)
@click.option("--force", is_flag=True, help="Replace FILE.jsonl.")
@click.option("--json", "as_json", is_flag=True, help="Print the scores as JSON.")
def eval(  # the command's name
    base: str,
    data: Path,
    adapters: tuple[str, ...],
    held_out: Path | None,
    generations: int,
    examples: int,
    per_example: Path | None,
    batch_size: int,
    max_length: int,
    device: str,
    force: bool,
    as_json: bool,
) -> None:
    """Score BASE and adapters on the rows of DATA (JSONL as for `loraport train`).

    Loss and perplexity are per token that counts: the completion, the assistant's turns, or all
    of a text. Exact match is the share of rows whose greedy answer is the expected one. Warns of
    an adapter that does nothing, and of one that makes other text worse.
    """
    from converters.formats.registry import read_adapter
    from loraport.base.finding import resolve_base
    from loraport.base.loading import load_causal_lm, load_tokenizer
    from loraport.evaluation import evaluate
    from loraport.evaluation.evaluate import text_rows
    from loraport.output import refuse_existing, refuse_other_kind
    from loraport.training.data.text_data import row_length
    from loraport.training.data.tokens import read_rows
    from loraport.training.devices import choose_placement

    paths = _named(adapters)
    if per_example is not None:
        inputs = (base, data, held_out, *paths.values())
        refuse_existing(per_example, force=force, inputs=inputs)
        refuse_other_kind(per_example, directory=False)
    loaded = {name: read_adapter(path, base=base) for name, path in paths.items()}
    tokenizer = load_tokenizer(base)
    max_length = row_length(resolve_base(base), max_length)
    rows = read_rows(data, tokenizer, max_length, progress)
    for note in rows.notes(data, max_length):
        log.print(f"note: {note}", soft_wrap=True)
    text = None if held_out is None else _paragraphs(held_out)
    model = load_causal_lm(base, device=str(choose_placement(device, "float32").device))
    with ShareLine() as line:

        def tell(name: str, done: int, total: int) -> None:
            if line.is_due(done / total):
                line.show(done / total, f"scoring {name}: {done} of {total}, {done / total:.0%}")

        report = evaluate(
            model,
            tokenizer,
            loaded,
            rows.rows,
            held_out=None if text is None else text_rows(text, tokenizer, max_length),
            generations=generations,
            batch_size=batch_size,
            progress=tell,
        )
    for warning in report.warnings:
        log.print(f"warning: {warning}", style="yellow", soft_wrap=True)
    if as_json:
        click.echo(json.dumps(_document(report, rows), indent=2))
    else:
        _show(report, len(rows.rows), examples)
    if per_example is not None:  # after the scores, which a full disk does not take away
        _write_rows(per_example, report, force=force)


def _named(values: tuple[str, ...]) -> dict[str, Path]:
    """Read ``ADAPTER`` or ``NAME=ADAPTER``; without a name it is the path's last part."""
    found: dict[str, Path] = {}
    for value in values:
        name, equals, path = value.partition("=")
        if not equals or Path(value).exists():
            name, path = Path(value).name, value
        if not name:
            raise LoraportError(
                f"--adapter {value}: expected a name to show it by, got none; give NAME=ADAPTER"
            )
        if name in found:
            raise LoraportError(f"--adapter {value}: expected another name than {name!r}, again")
        found[name] = Path(path)
    return found


def _paragraphs(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LoraportError(f"--held-out {path}: cannot be read: {error}") from error
    paragraphs = [part for part in text.split("\n\n") if part.strip()]
    if not paragraphs:
        raise LoraportError(f"--held-out {path}: expected some text, got none")
    return paragraphs


def _document(report: Evaluation, rows: Rows) -> dict[str, object]:
    scores = [
        {key: _plain(value) for key, value in asdict(s).items() if key not in ("rows", "answers")}
        | {"generations": len(s.answers)}
        for s in report.scores
    ]
    return {
        "rows": len(rows.rows),
        "truncated_rows": rows.truncated,
        "dropped_rows": len(rows.dropped),
        "scores": scores,
        "warnings": list(report.warnings),
    }


def _plain(value: object) -> object:
    """Return a value as JSON has it, which knows no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _write_rows(path: Path, report: Evaluation, *, force: bool) -> None:
    from loraport.output import new_file

    with new_file(path, force=force) as partial, partial.open("w", encoding="utf-8") as file:
        for scores in report.scores:
            answers = {answer.row: answer for answer in scores.answers}
            for place, row in enumerate(scores.rows):
                facts = {key: _plain(value) for key, value in asdict(row).items()}
                line = {"model": scores.name, **facts}
                answer = answers.get(place)
                if answer is not None:
                    line |= {"expected": answer.expected, "answer": answer.got}
                    line |= {"exact": answer.exact, "ended": answer.ended}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _show(report: Evaluation, rows: int, examples: int) -> None:
    from rich.markup import escape
    from rich.table import Table

    from loraport.cli.reports import table_console

    table = Table(title=counted(rows, "row"), title_justify="left")
    table.add_column("model")
    for heading in ("loss", "perplexity", "token accuracy", "exact match", "held-out loss"):
        table.add_column(heading, justify="right")
    for s in report.scores:
        exact = "" if s.exact_match is None else f"{s.exact_match:.1%} of {len(s.answers)}"
        numbers = (f"{s.loss:.4f}", f"{s.perplexity:.3f}", f"{s.token_accuracy:.1%}", exact)
        table.add_row(escape(s.name), *numbers, f"{s.held_out_loss:.4f}")
    table_console().print(table)
    for index in range(min(examples, len(report.scores[0].answers))):
        first = report.scores[0].answers[index]
        click.echo(f"\nline {first.line}, expected: {visible(first.expected)}")
        for s in report.scores:
            answer = s.answers[index]
            exact = " (exact)" if answer.exact else "" if answer.ended else " (goes on)"
            click.echo(f"  {s.name}{exact}: {visible(answer.got)}")
