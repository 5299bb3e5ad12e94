"""Train a language model's adapter from a JSONL file to an adapter directory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from loraport.adapter import Adapter
from loraport.base.config import read_model_config
from loraport.base.finding import resolve_base
from loraport.base.loading import fingerprint_model, load_tokenizer
from loraport.errors import LoraportError
from loraport.fingerprint import BaseFingerprint
from loraport.option_checks import given_or_default
from loraport.output import new_directory, refuse_existing, refuse_other_kind
from loraport.peft_layout.misread import misread_by_peft
from loraport.peft_layout.write import peft_contents, save_contents
from loraport.process_lock import only_process
from loraport.training.base.frozen_base import QUANTIZED, checkpoint_activations, load_base, narrow
from loraport.training.data.batches import Row
from loraport.training.data.packing import make_batches
from loraport.training.data.text_data import TextData, digest, padding_token, read_data
from loraport.training.devices import choose_placement
from loraport.training.distributed.processes import Processes, processes_now
from loraport.training.distributed.sharing import refuse_for_processes
from loraport.training.distributed.stream import Batches
from loraport.training.kernels.compiled import compiled_layers
from loraport.training.kernels.cuda_graphs import (
    NOT_RECORDED,
    RecordedPasses,
    asked_to_record,
    why_not_recorded,
)
from loraport.training.kernels.liger_kernels import liger_function, liger_kernels
from loraport.training.kernels.row_attention import use_row_attention
from loraport.training.lora.full_rank import above_full_rank
from loraport.training.lora.inject import adapter_of, attach
from loraport.training.lora.targets import select_targets
from loraport.training.losses.language_model import language_model_loss
from loraport.training.losses.loss import LossFunction
from loraport.training.options import TrainOptions
from loraport.training.run.checkpoints import FREE_OPTIONS, last_checkpoint, require_same_run
from loraport.training.run.curve import draw_losses
from loraport.training.run.faults import faults_explained, kept
from loraport.training.run.loop import TrainingResult, loop_identity, train
from loraport.training.run.metrics import METRICS_FILE
from loraport.training.run.observer import Observer, Silent
from loraport.training.run.savers import savers_told

SUMMARY_FILE = "training.json"
CURVE_FILE = "loss.png"


@dataclass(frozen=True)
class TrainingSummary:
    """What came out of a training, for the final table and ``--json``.

    Attributes:
        adapter: The directory written.
        base: The base as it was named.
        trainable_parameters: Numbers trained.
        trainable_share: Their share of all parameters, the adapter's included.
        adapter_bytes: Size of the adapter's tensors.
        base_validation_loss: Mean loss per token of the base on the validation rows.
        validation_loss: The same with the adapter; ``None`` without validation rows.
        kept_step: The step whose adapter was kept: the last, unless training stopped early.
        training_loss: Mean training loss of the last tenth of the steps.
        steps: Optimizer steps.
        tokens: Tokens of the rows seen, however they lie in batches.
        rows: Training rows.
        validation_rows: Held-out rows.
        truncated_rows: Rows cut to the largest length.
        dropped_rows: Rows left out because nothing to learn was left after the cut.
        recorded_passes: Shapes of batches whose passes were recorded (CUDA graphs).
        device: Where it was trained.
        dtype: Precision of the matrix products.
        seconds: Time taken by this process, without loading.
    """

    adapter: str
    base: str
    trainable_parameters: int
    trainable_share: float
    adapter_bytes: int
    base_validation_loss: float | None
    validation_loss: float | None
    kept_step: int
    training_loss: float
    steps: int
    tokens: int
    rows: int
    validation_rows: int
    truncated_rows: int
    dropped_rows: int
    device: str
    dtype: str
    seconds: float
    recorded_passes: int = 0


def train_language_model(
    base: Path | str,
    data: Path | str,
    out: Path | str,
    options: TrainOptions | None = None,
    *,
    validation: Path | str | None = None,
    resume: bool = False,
    force: bool = False,
    observer: Observer | None = None,
) -> TrainingSummary:
    """Train an adapter and write its directory, which appears whole or not at all.

    Checkpoints and metrics are kept in ``OUT.training`` beside it until then.

    Args:
        base: Any base that `loraport.base.finding.resolve_base` finds.
        data: Training rows, JSONL.
        out: The adapter directory to write: PEFT's layout, ``metrics.jsonl``, ``loss.png`` and
            ``training.json``.
        options: All options.
        validation: Held-out rows; without it, a share of ``data`` is held out.
        resume: Continue a run that was stopped.
        force: Replace ``out``, and discard an unfinished run unless ``resume``.
        observer: Told what happens.

    Raises:
        LoraportError: For anything wrong with the base, data, options or outputs, if another
            process trains for ``out``, or if memory or disk space runs out.
        Stopped: After SIGINT, SIGTERM or SIGHUP; the run can be resumed.
    """
    options = given_or_default(options, TrainOptions)
    base, data, out = str(base), Path(data), Path(out)
    validation = None if validation is None else Path(validation)
    processes = processes_now()
    alone = only_process(out) if processes.first else contextlib.nullcontext()
    with alone, contextlib.ExitStack() as during:
        return _train(
            base,
            data,
            out,
            options,
            validation,
            resume=resume,
            force=force,
            observer=observer if observer is not None and processes.first else Silent(),
            processes=processes,
            during=during,
        )


def _train(
    base: str,
    data: Path,
    out: Path,
    options: TrainOptions,
    validation: Path | None,
    *,
    resume: bool,
    force: bool,
    observer: Observer,
    processes: Processes,
    during: contextlib.ExitStack,
) -> TrainingSummary:
    work = work_directory(out)
    if processes.first:
        inputs = (base, data, validation)
        refuse_existing(out, force=force or resume, inputs=inputs)
        refuse_existing(work, force=True, inputs=inputs)
        for directory in (out, work):
            refuse_other_kind(directory, directory=True)
        if not (resume or force):
            _refuse_unfinished(work)
        resolve_base(base)  # a download or conversion that the others then find
    processes.wait()
    refuse_for_processes(options, processes)
    tokenizer = load_tokenizer(base)
    rows = read_data(base, data, validation, tokenizer, options, observer)
    going_on = partial(last_checkpoint, work)
    during.enter_context(savers_told(base, rows, options, going_on, processes=processes.size))
    identity = _identity(rows, options)
    placement = choose_placement(options.loop.device, options.loop.dtype)
    whole_identity = {**identity, **loop_identity(options.loop, placement)}
    if resume and not force and processes.from_first(out.exists):

        def finished() -> TrainingSummary:
            model = load_base(base, placement, "cpu", options.base_dtype)
            here = fingerprint_model(model, list(select_targets(model, options.lora)))
            return _finished_before(out, work, whole_identity | _base_identity(here))

        return processes.from_first(finished)
    if options.liger_kernel:
        kind = read_model_config(resolve_base(base)).get("model_type")
        liger_function(str(kind), placement.device)  # or a refusal, before anything is discarded
    graphs = asked_to_record(placement.device, options, processes.size)
    if not resume and processes.first:
        shutil.rmtree(work, ignore_errors=True)
    with faults_explained(lambda: f"loading {base}", lambda: kept(work)):
        sharded = options.loop.shard_base and processes.size > 1
        narrowed = options.base_dtype in ("bfloat16", *QUANTIZED)
        first = "cpu" if sharded or narrowed else str(placement.device)
        model = load_base(base, placement, first, options.base_dtype)
        parameters = sum(parameter.numel() for parameter in model.parameters())
        fingerprint = None
        if narrowed:
            # An adapter belongs to the base as it is published, not as it is stored here.
            fingerprint = fingerprint_model(model, list(select_targets(model, options.lora)))
            narrow(model, options.base_dtype, placement)
            if not sharded:
                model.to(placement.device)  # whole: quantized layers are there already
    if options.liger_kernel:
        during.enter_context(liger_kernels(model, placement.device))
    longest = max(len(row.tokens) for row in rows.train)
    if graphs and options.cuda_graphs is None:
        reason = why_not_recorded(model, longest)
        graphs = reason is None
        if reason is not None:
            observer.note(f"{NOT_RECORDED} {reason}")
    if graphs:
        # Not elsewhere: what calls its kernel is Python, and a GPU would wait for that.
        use_row_attention(model, placement, rows.length)
    ranks = above_full_rank(model, [options.lora])
    adapted = attach(model, options.lora)
    misread = misread_by_peft(model.config.model_type, adapted)
    for said in filter(None, (ranks, misread)):
        observer.note(said)
    if options.gradient_checkpointing:
        checkpoint_activations(model, options.checkpointed_layers)
    pad = padding_token(tokenizer)

    loss: LossFunction = language_model_loss
    where: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    recorded = None
    if graphs:
        tentative = options.cuda_graphs is None
        recorded = RecordedPasses(model, tentative=tentative, note=observer.note)
        loss, where = partial(language_model_loss, hidden=recorded), recorded.stream()

    def batches(part: tuple[Row, ...], seed: int | None) -> Batches:
        return make_batches(
            model,
            part,
            options.batch_size,
            pad,
            seed,
            packing=options.packing,
            max_length=rows.length,
            few_lengths=graphs and seed is not None,
        )

    data_batches = batches(rows.train, options.loop.seed)
    held_out = batches(rows.validation, None) if rows.validation else None
    started = time.monotonic()
    compiled = compiled_layers(model) if options.compile else contextlib.nullcontext()
    with compiled, where:
        result = train(
            model,
            data_batches,
            loss,
            options.loop,
            validation=held_out,
            work=work,
            resume=resume,
            identity=identity,
            observer=observer,
            base_fingerprint=fingerprint,
        )
    facts = {"task_type": "CAUSAL_LM", "lora_dropout": options.lora.dropout}
    adapter = adapter_of(
        model, base_model=base, base_fingerprint=result.base_fingerprint, training=facts
    )
    summary = TrainingSummary(
        adapter=str(out),
        base=base,
        trainable_parameters=adapter.parameters,
        trainable_share=adapter.parameters / (parameters + adapter.parameters),
        adapter_bytes=adapter.nbytes,
        base_validation_loss=result.validations[0][1] if result.validations else None,
        validation_loss=result.kept[1] if result.kept else None,
        kept_step=result.kept[0] if result.kept else result.steps,
        training_loss=_last_losses(result),
        steps=result.steps,
        tokens=result.tokens,
        rows=len(rows.train),
        validation_rows=len(rows.validation),
        truncated_rows=rows.truncated,
        dropped_rows=rows.dropped,
        device=str(placement.device),
        dtype=str(placement.dtype).removeprefix("torch."),
        seconds=round(time.monotonic() - started, 3),
        recorded_passes=recorded.recorded if recorded is not None else 0,
    )
    with faults_explained(lambda: f"writing {out}", lambda: kept(work)):
        if processes.first:
            assert result.base_fingerprint is not None
            whole_identity |= _base_identity(result.base_fingerprint)
            _write(out, work, adapter, result, summary, whole_identity, force=force)
    return summary


def work_directory(out: Path) -> Path:
    """Return where an unfinished run for ``out`` keeps its checkpoints."""
    return out.with_name(f"{out.name}.training")


def _refuse_unfinished(work: Path) -> None:
    if work.exists():
        raise LoraportError(
            f"{work} holds a run that was not finished; continue it with --resume, or discard "
            "it with --force"
        )


def _identity(rows: TextData, options: TrainOptions) -> dict[str, Any]:
    """Return what a resumed run must share; the loop adds its own options."""
    lora = {f"lora.{key}": value for key, value in asdict(options.lora).items()}
    others = FREE_OPTIONS | {"lora", "loop"}
    plain = {key: value for key, value in asdict(options).items() if key not in others}
    digests = {
        "training rows (data, tokenizer, chat template)": digest(rows.train),
        "validation rows": digest(rows.validation),
    }
    identity: dict[str, Any] = json.loads(json.dumps({**lora, **plain, **digests}))
    return identity


def _base_identity(fingerprint: BaseFingerprint) -> dict[str, str]:
    return {"base weights": hashlib.sha256(fingerprint.to_json().encode()).hexdigest()}


def _finished_before(out: Path, work: Path, identity: dict[str, Any]) -> TrainingSummary:
    """Return what a finished run wrote; only the removal of its checkpoints may be missing."""
    path = out / SUMMARY_FILE
    try:
        document = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        raise LoraportError(
            f"{out} already exists and is not a training's result; choose another output or pass "
            "--force"
        ) from None
    try:
        stored, summary = dict(document["identity"]), TrainingSummary(**document["summary"])
    except (KeyError, TypeError, ValueError):
        raise LoraportError(
            f"{path}: expected what this version of loraport writes when a run is finished, got "
            "another version's or something else; nothing is left to resume there: use the "
            "adapter as it is, or choose another output or pass --force to train again"
        ) from None
    require_same_run(out, stored, identity)
    shutil.rmtree(work, ignore_errors=True)
    return summary


def _last_losses(result: TrainingResult) -> float:
    losses = [loss for _, loss in result.losses[-max(1, len(result.losses) // 10) :]]
    return sum(losses) / len(losses)


def _write(
    out: Path,
    work: Path,
    adapter: Adapter,
    result: TrainingResult,
    summary: TrainingSummary,
    identity: dict[str, Any],
    *,
    force: bool,
) -> None:
    config, tensors = peft_contents(adapter)
    document = {"summary": asdict(summary), "identity": identity}
    with new_directory(out, force=force) as partial:
        save_contents(partial, adapter, config, tensors)
        shutil.copy(work / METRICS_FILE, partial / METRICS_FILE)
        draw_losses(result, partial / CURVE_FILE)
        (partial / SUMMARY_FILE).write_text(json.dumps(document, indent=2) + "\n")
    # Only now is nothing left to resume.
    shutil.rmtree(work)
