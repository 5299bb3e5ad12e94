"""Run a sweep on a language model: from JSONL rows to the adapter to take, a table and a plot."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from loraport.base.finding import resolve_base
from loraport.base.loading import load_tokenizer
from loraport.errors import LoraportError
from loraport.option_checks import given_or_default
from loraport.output import refuse_existing, refuse_other_kind
from loraport.process_lock import only_process
from loraport.sweep.choose import choose
from loraport.sweep.finished import finished_before
from loraport.sweep.groups import most_together
from loraport.sweep.observer import SilentSweep, SweepObserver
from loraport.sweep.options import SweepOptions
from loraport.sweep.output import write_result
from loraport.sweep.result import SweepResult, sweep_result
from loraport.sweep.rounds import ThisProcess, Trainers, train_all
from loraport.sweep.spread import Cluster, connect
from loraport.sweep.store import Store, keeps_any
from loraport.sweep.worker import Setting
from loraport.training.data.text_data import TextData, digest, padding_token, read_data
from loraport.training.devices import choose_placement
from loraport.training.kernels.cuda_graphs import asked_to_record
from loraport.training.run.checkpoints import FREE_OPTIONS
from loraport.training.run.faults import faults_explained
from loraport.training.run.interruption import Stopped, stop_requests
from loraport.training.run.savers import savers_told


def run_sweep(
    base: Path | str,
    data: Path | str,
    out: Path | str,
    options: SweepOptions | None = None,
    *,
    validation: Path | str | None = None,
    resume: bool = False,
    force: bool = False,
    observer: SweepObserver | None = None,
) -> SweepResult:
    """Train every candidate and write a directory with the one to take, which appears whole.

    Candidates are kept in ``OUT.sweep`` beside it until then, as far as they are trained.

    Args:
        base: Any base that `loraport.base.finding.resolve_base` finds.
        data: Training rows, JSONL.
        out: The directory to write.
        options: All options.
        validation: Held-out rows; without it, a share of ``data`` is held out.
        resume: Continue a sweep that was stopped, from what is kept; of one that is finished
            the result is returned.
        force: Replace ``out``, and discard an unfinished sweep unless ``resume``.
        observer: Told what happens.

    Raises:
        LoraportError: For anything wrong with the base, data, options or outputs, if another
            process works on ``out``, if no candidate could be trained, or if memory runs out for
            a single one.
        Stopped: After SIGINT, SIGTERM or SIGHUP; one that comes while ``out`` is written waits for
            that.
    """
    options = given_or_default(options, SweepOptions)
    base, data, out = str(base), Path(data), Path(out)
    validation = None if validation is None else Path(validation)
    observer = observer or SilentSweep()
    with only_process(out), ExitStack() as during:
        try:
            with faults_explained(lambda: f"writing {out}", lambda: _kept(_work(out))):
                return _run(base, data, out, options, validation, resume, force, observer, during)
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
    during: ExitStack,
) -> SweepResult:
    trials = options.grid.trials(options.train.lora)
    work = _work(out)
    for directory, replaced in ((out, force or resume), (work, True)):
        refuse_existing(directory, force=replaced, inputs=(base, data, validation))
        refuse_other_kind(directory, directory=True)
    if work.exists() and not (resume or force):
        raise LoraportError(
            f"{work} holds a sweep that was not finished; continue it with --resume, or discard "
            "it with --force"
        )
    resolve_base(base)
    tokenizer = load_tokenizer(base)
    rows = read_data(base, data, validation, tokenizer, options.train, observer)
    kept = partial(keeps_any, work)
    during.enter_context(savers_told(base, rows, options.train, kept, sweep=True))
    if not rows.validation:
        raise LoraportError(
            "validation rows: expected some, by which candidates are compared, got none; give "
            "--validation or a --validation-share above 0"
        )
    identity = _identity(base, rows, options)
    if resume and not force and out.exists():
        result = finished_before(out, base, identity, trials)
        shutil.rmtree(work, ignore_errors=True)
        return result
    if options.spread is None:  # or a refusal, before anything is discarded
        loop = options.train.loop
        asked_to_record(choose_placement(loop.device, loop.dtype).device, options.train)
    if not resume:
        shutil.rmtree(work, ignore_errors=True)
    with ExitStack() as stack:
        if not work.exists():
            stack.enter_context(_removed_where_empty(work))
        store = Store(work, identity)
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
    result = sweep_result(base, out, trained, choice)
    with stop_requests() as stop:
        write_result(out, trained, result, identity, keep_all=options.keep_all, force=force)
        shutil.rmtree(work)
    if stop.signal_number is not None:
        observer.note(f"{out} is complete")
        raise Stopped(stop.signal_number)
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


def _kept(work: Path) -> str:
    return f"{work} keeps what was trained" if keeps_any(work) else "nothing is trained yet"


@contextmanager
def _removed_where_empty(work: Path) -> Iterator[None]:
    """Leave no unfinished sweep of which there is nothing: it would have to be discarded."""
    try:
        yield
    except BaseException:
        if not keeps_any(work):
            shutil.rmtree(work, ignore_errors=True)
        raise


def _identity(base: str, rows: TextData, options: SweepOptions) -> dict[str, Any]:
    train = asdict(options.train)
    loop = {key: value for key, value in train["loop"].items() if key not in FREE_OPTIONS}
    others = FREE_OPTIONS | {"lora", "loop"}
    plain = {key: value for key, value in train.items() if key not in others}
    digests = {"training rows": digest(rows.train), "validation rows": digest(rows.validation)}
    # However a path is spelled; a name of a hub has no other spelling.
    facts = {"base": os.path.normpath(base), **loop, **plain, **digests, "halving": options.halving}
    found: dict[str, Any] = json.loads(json.dumps(facts))
    found.pop("learning_rate")
    return found
