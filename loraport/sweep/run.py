"""Run a sweep on a language model: from JSONL rows to the adapter to take, a table and a plot."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from loraport.base_model import load_tokenizer, resolve_base
from loraport.errors import LoraportError
from loraport.output import new_directory, refuse_existing
from loraport.peft_layout.write import peft_contents, save_contents
from loraport.sweep.choose import Choice, choose
from loraport.sweep.groups import most_together
from loraport.sweep.observer import SilentSweep, SweepObserver
from loraport.sweep.options import SweepOptions
from loraport.sweep.plot import draw_quality
from loraport.sweep.rounds import ThisProcess, Trainers, train_all
from loraport.sweep.spread import Cluster, connect
from loraport.sweep.store import Store
from loraport.sweep.worker import Setting, Trained
from loraport.training.devices import choose_placement
from loraport.training.lock import only_process
from loraport.training.text_data import TextData, digest, padding_token, read_data

RESULTS_FILE, TABLE_FILE, PLOT_FILES = "results.json", "results.csv", ("quality.png", "quality.svg")


@dataclass(frozen=True)
class Line:
    """One candidate in the table.

    Attributes:
        name: The candidate.
        rank: Its rank.
        alpha: Its alpha.
        targets: What it adapts.
        layers: In which layers; empty for all.
        learning_rate: Peak learning rate.
        parameters: Numbers trained.
        adapter_bytes: Size of the adapter's tensors.
        training_loss: Mean of the last tenth of its steps.
        validation_loss: At its best step.
        best_step: That step.
        above_best: Validation loss less that of the best candidate.
        standard_error: Of that difference.
        within_noise: Whether the difference is no larger than that.
        taken: Whether it is the one to take.
        ended: Why it ended early.
    """

    name: str
    rank: int
    alpha: float
    targets: str
    layers: str
    learning_rate: float
    parameters: int
    adapter_bytes: int
    training_loss: float | None
    validation_loss: float | None
    best_step: int | None
    above_best: float | None
    standard_error: float | None
    within_noise: bool
    taken: bool
    ended: str


@dataclass(frozen=True)
class SweepResult:
    """What came of a sweep.

    Attributes:
        directory: Where it lies; the adapter taken in PEFT's layout.
        base: The base as it was named.
        base_validation_loss: Of the base alone.
        taken: Name of the candidate to take.
        best: Name of that with the lowest validation loss.
        reason: Why the one is taken.
        better_than_base: Whether it is better than the base alone.
        candidates: All of them, the best first.
    """

    directory: str
    base: str
    base_validation_loss: float
    taken: str
    best: str
    reason: str
    better_than_base: bool
    candidates: tuple[Line, ...]


def run_sweep(
    base: str,
    data: Path,
    out: Path,
    options: SweepOptions | None = None,
    *,
    validation: Path | None = None,
    resume: bool = False,
    force: bool = False,
    observer: SweepObserver | None = None,
) -> SweepResult:
    """Train every candidate and write a directory with the one to take, which appears whole.

    Candidates are kept in ``OUT.sweep`` beside it until then, as far as they are trained.

    Args:
        base: Any base that `loraport.base_model.resolve_base` finds.
        data: Training rows, JSONL.
        out: The directory to write.
        options: All options.
        validation: Held-out rows; without it, a share of ``data`` is held out.
        resume: Continue a sweep that was stopped, from what is kept.
        force: Replace ``out``, and discard an unfinished sweep unless ``resume``.
        observer: Told what happens.

    Raises:
        LoraportError: For anything wrong with the base, data, options or outputs, if another
            process works on ``out``, or if no candidate could be trained.
    """
    options = options or SweepOptions()
    observer = observer or SilentSweep()
    with only_process(out):
        try:
            return _run(base, data, out, options, validation, resume, force, observer)
        except KeyboardInterrupt:
            if (work := _work(out)).exists():
                observer.note(f"{work} keeps what was trained: continue with --resume")
            raise
        finally:
            observer.finished()


def _run(
    base: str,
    data: Path,
    out: Path,
    options: SweepOptions,
    validation: Path | None,
    resume: bool,
    force: bool,
    observer: SweepObserver,
) -> SweepResult:
    trials = options.grid.trials(options.train.lora)
    work = _work(out)
    refuse_existing(out, force=force)
    if work.exists() and not (resume or force):
        raise LoraportError(
            f"{work} holds a sweep that was not finished; continue it with --resume, or discard "
            "it with --force"
        )
    resolve_base(base)
    tokenizer = load_tokenizer(base)
    rows = read_data(base, data, validation, tokenizer, options.train, observer)
    if not rows.validation:
        raise LoraportError(
            "validation rows: expected some, by which candidates are compared, got none; give "
            "--validation or a --validation-share above 0"
        )
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    store = Store(work, _identity(base, rows, options))
    with ExitStack() as stack:
        cluster = None
        if options.spread and not store.complete(trials):
            cluster = stack.enter_context(connect(options.spread, options.train.loop.device))
        pad = padding_token(tokenizer)
        setting = Setting(base, rows.train, rows.validation, pad, rows.length, options.train)
        trainers: Trainers = ThisProcess(setting, trials, observer)
        if cluster:
            trainers = stack.enter_context(cluster.hired(setting, trials, observer))
        train_all(
            trials,
            trainers,
            store,
            halving=options.halving,
            together=options.together or most_together(*_pass(rows, options, cluster)),
            workers=cluster.workers if cluster else 1,
            observer=observer,
        )
    trained = [store.read(trial) for trial in trials]
    sizes = {each.trial.name: each.adapter.nbytes if each.adapter else 0 for each in trained}
    choice = choose([each.outcome for each in trained], sizes)
    if not choice.better_than_base:
        observer.note("no candidate is better than the base: try other learning rates or more data")
    result = _result(base, out, trained, choice)
    _write(out, trained, result, keep_all=options.keep_all, force=force)
    shutil.rmtree(work)
    return result


def _pass(rows: TextData, options: SweepOptions, cluster: Cluster | None) -> tuple[str, float]:
    """Return the type of device that trains, and about how many tokens a candidate's batch has."""
    loop = options.train.loop
    on_gpu = "cuda" if cluster and cluster.gpus else ""
    device = on_gpu or choose_placement("cpu" if cluster else loop.device, loop.dtype).device.type
    mean = sum(len(row.tokens) for row in rows.train) / max(1, len(rows.train))
    return device, mean * options.train.batch_size


def _work(out: Path) -> Path:
    return out.with_name(f"{out.name}.sweep")


def _identity(base: str, rows: TextData, options: SweepOptions) -> dict[str, Any]:
    train = asdict(options.train)
    loop = {key: value for key, value in train["loop"].items() if key not in ("save_every", "keep")}
    plain = {key: value for key, value in train.items() if key not in ("lora", "loop")}
    digests = {"training rows": digest(rows.train), "validation rows": digest(rows.validation)}
    facts = {"base": base, **loop, **plain, **digests, "halving": options.halving}
    found: dict[str, Any] = json.loads(json.dumps(facts))
    found.pop("learning_rate")
    return found


def _result(base: str, out: Path, trained: Sequence[Trained], choice: Choice) -> SweepResult:
    lines = [_line(each, choice) for each in trained]
    lines.sort(key=lambda line: (line.above_best is None, line.above_best or 0.0))
    sound = next(t.outcome for t in trained if t.trial.name == choice.best)
    return SweepResult(
        directory=str(out),
        base=base,
        base_validation_loss=sound.validations[0][1],
        taken=choice.taken,
        best=choice.best,
        reason=choice.reason,
        better_than_base=choice.better_than_base,
        candidates=tuple(lines),
    )


def _line(trained: Trained, choice: Choice) -> Line:
    trial, outcome, adapter = trained.trial, trained.outcome, trained.adapter
    last = [loss for _, loss in outcome.losses[-max(1, len(outcome.losses) // 10) :]]
    difference = choice.differences.get(trial.name)
    targets = trial.lora.targets
    return Line(
        name=trial.name,
        rank=trial.lora.rank,
        alpha=trial.lora.effective_alpha,
        targets=targets if isinstance(targets, str) else ",".join(targets),
        layers=trial.lora.layers,
        learning_rate=trial.learning_rate,
        parameters=adapter.parameters if adapter else 0,
        adapter_bytes=adapter.nbytes if adapter else 0,
        training_loss=sum(last) / len(last) if last else None,
        validation_loss=outcome.best[1] if outcome.best else None,
        best_step=outcome.best[0] if outcome.best else None,
        above_best=difference.mean if difference else None,
        standard_error=difference.error if difference else None,
        within_noise=difference is not None and difference.within_noise,
        taken=trial.name == choice.taken,
        ended=outcome.ended,
    )


def _write(
    out: Path, trained: Sequence[Trained], result: SweepResult, *, keep_all: bool, force: bool
) -> None:
    with new_directory(out, force=force) as partial:
        for each in trained:
            if each.adapter is None:
                continue
            contents = peft_contents(each.adapter)
            if each.trial.name == result.taken:
                save_contents(partial, each.adapter, *contents)
            if keep_all:
                directory = partial / "candidates" / each.trial.name
                directory.mkdir(parents=True)
                save_contents(directory, each.adapter, *contents)
        (partial / RESULTS_FILE).write_text(json.dumps(asdict(result), indent=2) + "\n")
        lines: list[Mapping[str, Any]] = [asdict(line) for line in result.candidates]
        with (partial / TABLE_FILE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
        for name in PLOT_FILES:
            draw_quality(result, partial / name)
