"""The training loop, the same for language models and any other module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraport.base.loading import fingerprint_model
from loraport.errors import LoraportError
from loraport.fingerprint import BaseFingerprint
from loraport.option_checks import given_or_default
from loraport.training import rng
from loraport.training.devices import Placement, choose_placement, to_device
from loraport.training.distributed.processes import Processes, processes_now
from loraport.training.distributed.sharded_base import shard_base
from loraport.training.distributed.sharing import own_part, share, unpacked
from loraport.training.distributed.stream import Batches, BatchStream, EndOfEpoch
from loraport.training.kernels.fused_norms import fused_norms
from loraport.training.lora.inject import adapter_of, lora_layers
from loraport.training.lora.lora_layer import LoraLayer
from loraport.training.lora.rounded import RoundedMatrices
from loraport.training.losses.loss import LossFunction, LossSum, as_sum
from loraport.training.modes import training_mode
from loraport.training.options import LoopOptions
from loraport.training.run.checkpoints import (
    FREE_OPTIONS,
    Position,
    RunState,
    last_checkpoint,
    load_checkpoint,
    require_same_run,
    restore_adapter,
    save_checkpoint,
)
from loraport.training.run.early_stopping import EarlyStopping
from loraport.training.run.faults import (
    NotFiniteError,
    faults_explained,
    kept,
    require_finite,
    require_finite_validation,
)
from loraport.training.run.interruption import Stopped, StopRequest, stop_requests
from loraport.training.run.metrics import MetricsLog
from loraport.training.run.observer import Observer, Silent
from loraport.training.run.optimizer import (
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
    step_where_finite,
    trained_parameters,
)
from loraport.training.run.schedule import learning_rate, total_steps
from loraport.training.run.validation import mean_loss


@dataclass(frozen=True)
class TrainingResult:
    """What a run did.

    Attributes:
        steps: Optimizer steps taken in all, before and after any interruption.
        tokens: Tokens (or what the loss function counted) consumed in all.
        losses: Step and mean loss of every step.
        validations: Step and validation loss of every validation; step 0 is the base alone.
        kept: The validation whose parameters the model is left with; ``None`` without any.
        base_fingerprint: Of the modules adapted; ``None`` where there was no need of it.
    """

    steps: int
    tokens: int
    losses: tuple[tuple[int, float], ...]
    validations: tuple[tuple[int, float], ...]
    kept: tuple[int, float] | None = None
    base_fingerprint: BaseFingerprint | None = field(default=None, compare=False)


def train(
    model: nn.Module,
    batches: Batches,
    loss: LossFunction,
    options: LoopOptions | None = None,
    *,
    validation: Batches | None = None,
    work: Path | str | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    observer: Observer | None = None,
    base_fingerprint: BaseFingerprint | None = None,
) -> TrainingResult:
    """Train the LoRA layers of a model that `attach` prepared, and nothing else of it.

    Where ``torch.distributed`` is initialised, all its processes share every step's batches: the
    result is that of one process, but for the order of sums. Each calls this with the same
    arguments; the first alone writes and tells the observer.

    Args:
        model: A model with LoRA layers; moved to the device, trained in place.
        batches: Iterated once per epoch; tensors in a batch are moved to the device.
        loss: From model and batch to a `LossSum`, or to a scalar mean.
        options: How the loop steps.
        validation: Batches for the validation loss: of the base at the start (``B`` is zero),
            then as ``validate_every`` says, and at the end.
        work: Directory of checkpoints and metrics; ``None`` for none.
        resume: Continue from the last checkpoint in ``work`` as if never stopped, or begin
            if there is none.
        identity: Facts about data and options that a resumed run must share.
        observer: Told what happens.
        base_fingerprint: Of the modules adapted, where the model holds their weights rounded
            (quantized); computed from the model where ``None``.

    Raises:
        LoraportError: If the model has no LoRA layers or other trainable parameters, the loss
            becomes NaN or infinite, memory or disk space runs out, or a resumed run differs
            from what it resumes.
        Stopped: After SIGINT, SIGTERM or SIGHUP, once the step is done and a checkpoint is written;
            only where there is a ``work`` directory.
    """
    options = given_or_default(options, LoopOptions)
    work = None if work is None else Path(work)
    processes = processes_now()
    observer = observer if observer is not None and processes.first else Silent()
    placement = choose_placement(options.device, options.dtype)
    layers = lora_layers(model)
    parameters = trained_parameters(model, layers)
    sharded = options.shard_base and processes.size > 1
    # The base is frozen: its fingerprint is taken once, and while it is whole.
    fingerprint = base_fingerprint
    if fingerprint is None and (work or sharded):
        fingerprint = fingerprint_model(model, list(layers))
    if sharded:
        shard_base(model, layers.values(), placement.device)
    else:
        model.to(placement.device)
    run = _Run(
        model=model,
        loss=loss,
        options=options,
        placement=placement,
        layers=layers,
        parameters=parameters,
        rounded=RoundedMatrices(layers.values(), placement.dtype),
        optimizer=make_optimizer(parameters, options, placement.device),
        steps=total_steps(batches, options),
        work=work if processes.first else None,
        identity={**dict(identity or {}), **loop_identity(options, placement)},
        observer=observer,
        processes=processes,
        fingerprint=fingerprint,
    )
    stream = BatchStream(
        share(batches, processes, options.accumulate), options.accumulate, processes
    )
    if options.early_stopping:
        if validation is None:
            raise LoraportError("early_stopping: expected validation batches, got none")
        run.early = EarlyStopping(options.early_stopping, parameters)
    with (
        training_mode(model),
        placement.attention(),
        fused_norms(model, placement.device),
        faults_explained(lambda: run.doing, lambda: kept(work)),
        stop_requests(active=work is not None) as run.stop,
    ):
        try:
            return run.go(stream, validation, resume=resume)
        finally:
            observer.finished()


def loop_identity(options: LoopOptions, placement: Placement) -> dict[str, Any]:
    """Return what a resumed run must share of the loop's options, and of where it computes."""
    return {
        **{key: value for key, value in asdict(options).items() if key not in FREE_OPTIONS},
        "device": placement.device.type,
        "dtype": str(placement.dtype),
    }


@dataclass(eq=False)
class _Run:
    """One run's parts, and its progress."""

    model: nn.Module
    loss: LossFunction
    options: LoopOptions
    placement: Placement
    layers: dict[str, LoraLayer]
    parameters: dict[str, nn.Parameter]
    rounded: RoundedMatrices
    optimizer: torch.optim.Optimizer
    steps: int
    work: Path | None
    identity: dict[str, Any]
    observer: Observer
    processes: Processes
    fingerprint: BaseFingerprint | None
    step: int = 0
    tokens: int = 0
    doing: str = "beginning"
    early: EarlyStopping | None = None
    diverged: bool = False
    stop: StopRequest = field(default_factory=StopRequest)

    def go(
        self, stream: BatchStream, validation: Batches | None, *, resume: bool
    ) -> TrainingResult:
        if self.work is not None:
            self.work.mkdir(parents=True, exist_ok=True)
        rng.seed_everything(self.options.seed)
        checkpoint = self.processes.from_first(self._last_checkpoint) if resume else None
        log = MetricsLog(self.work) if checkpoint is None else self._resume(checkpoint, stream)
        self.observer.started(steps=self.steps, done=self.step)
        try:
            if self.step == 0:
                self._validate(validation, log)
            self._all_steps(stream, validation, log)
            if not log.validations() or log.validations()[-1][0] != self.step:
                self._validate(validation, log)
            every = self.options.save_every
            if self.work and every and self.step % every and not self.diverged:
                # Should writing the result fail, nothing has to be trained again.
                self._save(stream, log)
            log.sync()
        finally:
            log.close()
        validations = tuple(log.validations())
        kept = validations[-1] if validations else None
        if self.early is not None and self.early.best_step is not None:
            self.early.restore_best()
            kept = next(v for v in validations if v[0] == self.early.best_step)
        losses = tuple(log.losses())
        return TrainingResult(self.step, self.tokens, losses, validations, kept, self.fingerprint)

    @property
    def ahead(self) -> bool:
        """Whether the device can be told of a step before its loss is read."""
        fused = getattr(self.optimizer, "_step_supports_amp_scaling", False)
        return bool(fused) and self.placement.device.type == "cuda"

    def _all_steps(self, stream: BatchStream, validation: Batches | None, log: MetricsLog) -> None:
        every, save = self.options.validate_every, self.options.save_every
        groups = iter(stream)
        while self.step < self.steps and not (self.early and self.early.exhausted):
            group = next(groups)
            if isinstance(group, EndOfEpoch):
                if not every:
                    self._validate(validation, log)
                continue
            part = own_part(group, stream.batches, self.processes)
            try:
                self._one_step(part, stream.epoch, log)
            except NotFiniteError as error:
                if self.early is None or self.early.best_step is None:
                    raise
                ends = "training ends, and the adapter that was best is kept"
                self.observer.note(f"{error.found}; {ends}")
                self.diverged = True  # and batches and random state are behind the last step
                return
            if every and self.step % every == 0:
                self._validate(validation, log)
            stopped_by = int(self.processes.largest(self.stop.signal_number or 0))
            if self.work and (stopped_by or (save and self.step % save == 0)):
                self._save(stream, log)
            if stopped_by:
                kept = self.processes.from_first(self._last_checkpoint)
                raise Stopped(stopped_by, self.step, kept)

    def _one_step(self, group: list[Any], epoch: int, log: MetricsLog) -> None:
        step = self.step + 1
        self.doing = f"step {step}"
        if not self.processes.first:
            rng.seed_beside_the_first(self.options.seed, step, self.processes.rank)
        self.optimizer.zero_grad(set_to_none=True)
        total, weight, tokens = torch.zeros((), dtype=torch.float64), 0.0, 0
        for entry in group:
            batch, counts = unpacked(entry)
            part = self._forward_and_backward(to_device(batch, self.placement.device), counts)
            total = total.to(self.placement.device) + part.total.double()
            weight, tokens = weight + part.weight, tokens + part.tokens
        self.processes.sum_gradients(self.parameters.values())
        if step == 1:
            self._note_unused()
        weight, counted = self.processes.sums(weight, tokens)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / weight)
        clip = self.options.clip or math.inf
        found = nn.utils.clip_grad_norm_(self.parameters.values(), clip)
        rate = learning_rate(step, self.steps, self.options.learning_rate, self.options.warmup)
        set_learning_rate(self.optimizer, rate)
        figures = torch.stack([total, found.to(total)])
        if self.ahead:
            step_where_finite(self.optimizer, figures)
        # Read together: this is where a GPU is waited for, once a step.
        own_total, norm = figures.tolist()
        (total_of_all,) = self.processes.sums(own_total)
        value, tokens = total_of_all / weight, int(counted)
        if not math.isfinite(value):
            group = [batch for part in self.processes.from_all(group) for batch in part]
        require_finite(value, "loss", step, group, self.work)
        require_finite(norm, "gradient norm", step, group, self.work)
        if not self.ahead:
            self.optimizer.step()
        self.step, self.tokens = step, self.tokens + tokens
        log.add(
            step=step,
            epoch=epoch + 1,
            loss=value,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=self.tokens,
        )
        self.observer.stepped(step=step, loss=value, learning_rate=rate, tokens=tokens)

    def _forward_and_backward(self, batch: Any, counts: bool) -> LossSum:
        with self.rounded.provided():
            with self.placement.autocast():
                part = as_sum(self.loss(self.model, batch))
            if not part.total.requires_grad:
                raise LoraportError(
                    "the loss: expected one that depends on the LoRA layers, got one without "
                    "gradient; does the forward pass call the modules that were adapted?"
                )
            if not counts:
                part = LossSum(part.total * 0, 0.0)
            part.total.backward()  # type: ignore[no-untyped-call]
        # Not with its graph, which would outlive the next batch.
        return part._replace(total=part.total.detach())

    def _validate(self, validation: Batches | None, log: MetricsLog) -> None:
        if validation is None:
            return
        self.doing = f"validating after step {self.step}"
        value = mean_loss(self.model, validation, self.loss, self.placement)
        if self.early is None or self.early.best_step is None:  # else the best is kept
            require_finite_validation(value, self.step, self.work)
        log.add(step=self.step, validation_loss=value)
        self.observer.validated(step=self.step, loss=value)
        if self.early is not None:
            self.early.see(self.step, value)
            if not math.isfinite(value):
                self.observer.note(
                    f"step {self.step}: the validation loss is {value}; training ends, and the "
                    f"adapter of step {self.early.best_step} is kept"
                )

    def _save(self, stream: BatchStream, log: MetricsLog) -> Path:
        assert self.work is not None
        self.doing = f"the checkpoint of step {self.step}"
        position = Position(self.step, stream.epoch, stream.index, self.tokens, log.sync())
        state = RunState(
            position=position,
            random=rng.capture(),
            epoch_random=stream.epoch_start,
            optimizer=optimizer_tensors(self.optimizer, self.parameters),
            identity=self.identity,
            best=self.early.best if self.early is not None else {},
        )
        adapter = adapter_of(self.model, base_fingerprint=self.fingerprint)
        return save_checkpoint(self.work, adapter, state, self.options.keep)

    def _resume(self, checkpoint: Path, stream: BatchStream) -> MetricsLog:
        adapter, state = self.processes.from_first(lambda: load_checkpoint(checkpoint))
        require_same_run(checkpoint, state.identity, self.identity)
        if adapter.base_fingerprint is not None and self.fingerprint is not None:
            adapter.base_fingerprint.require_same_base(
                self.fingerprint, f"checkpoint {checkpoint}", "the base at hand"
            )
        restore_adapter(self.layers, adapter, checkpoint)
        restore_optimizer(self.optimizer, self.parameters, state.optimizer)
        position = state.position
        self.step, self.tokens = position.step, position.tokens
        stream.seek(position.epoch, position.index, state.epoch_random)
        rng.restore(state.random)
        self.observer.note(f"resumed after step {self.step} from {checkpoint}")
        log = MetricsLog(self.work, position.metrics_bytes if self.work else 0)
        log.lines = self.processes.from_first(lambda: log.lines)
        if self.early is not None:
            self.early.resume(log.validations(), state.best)
        return log

    def _last_checkpoint(self) -> Path | None:
        return last_checkpoint(self.work) if self.work else None

    def _note_unused(self) -> None:
        unused = [path for path, layer in self.layers.items() if layer.lora_B.grad is None]
        if unused:
            shown = ", ".join(unused[:5]) + (" ..." if len(unused) > 5 else "")
            self.observer.note(
                f"{len(unused)} of {len(self.layers)} LoRA layers took no part in the first "
                f"step and learn nothing unless others reach them: {shown}"
            )
