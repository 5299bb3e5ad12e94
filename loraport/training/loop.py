"""The training loop, the same for language models and any other module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sized
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from loraport.base_model import fingerprint_model
from loraport.errors import LoraportError
from loraport.fingerprint import BaseFingerprint
from loraport.training import rng
from loraport.training.checkpoints import (
    Position,
    RunState,
    last_checkpoint,
    load_checkpoint,
    optimizer_tensors,
    require_same_run,
    restore_adapter,
    restore_optimizer,
    save_checkpoint,
)
from loraport.training.devices import Placement, choose_placement, to_device
from loraport.training.inject import adapter_of, lora_layers
from loraport.training.layers import LoraLayer
from loraport.training.loss import LossFunction, as_sum
from loraport.training.metrics import MetricsLog
from loraport.training.modes import training_mode
from loraport.training.observer import Observer, Silent
from loraport.training.options import LoopOptions
from loraport.training.schedule import learning_rate
from loraport.training.stream import Batches, BatchStream, EndOfEpoch
from loraport.training.validation import mean_loss

# Options that do not change what a run computes: a resumed run may have others.
_FREE_OPTIONS = frozenset(("save_every", "keep"))


@dataclass(frozen=True)
class TrainingResult:
    """What a run did.

    Attributes:
        steps: Optimizer steps taken in all, before and after any interruption.
        tokens: Tokens (or what the loss function counted) consumed in all.
        losses: Step and mean loss of every step.
        validations: Step and validation loss of every validation; step 0 is the base alone.
    """

    steps: int
    tokens: int
    losses: tuple[tuple[int, float], ...]
    validations: tuple[tuple[int, float], ...]


def train(
    model: nn.Module,
    batches: Batches,
    loss: LossFunction,
    options: LoopOptions | None = None,
    *,
    validation: Batches | None = None,
    work: Path | None = None,
    resume: bool = False,
    identity: Mapping[str, Any] | None = None,
    observer: Observer | None = None,
) -> TrainingResult:
    """Train the LoRA layers of a model that `attach` prepared, and nothing else of it.

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

    Raises:
        LoraportError: If the model has no LoRA layers or other trainable parameters, the loss
            becomes NaN or infinite, or a resumed run differs from what it resumes.
    """
    options = options or LoopOptions()
    observer = observer or Silent()
    placement = choose_placement(options.device, options.dtype)
    model.to(placement.device)
    layers = lora_layers(model)
    parameters = _lora_parameters(model, layers)
    run = _Run(
        model=model,
        loss=loss,
        options=options,
        placement=placement,
        layers=layers,
        parameters=parameters,
        optimizer=torch.optim.AdamW(
            parameters.values(),
            lr=options.learning_rate,
            weight_decay=options.weight_decay,
            fused=placement.device.type in ("cpu", "cuda"),
        ),
        steps=_total_steps(batches, options),
        work=work,
        identity={
            **dict(identity or {}),
            **{key: v for key, v in asdict(options).items() if key not in _FREE_OPTIONS},
            "device": placement.device.type,
            "dtype": str(placement.dtype),
        },
        observer=observer,
    )
    with training_mode(model):
        try:
            return run.go(BatchStream(batches, options.accumulate), validation, resume=resume)
        finally:
            observer.finished()


@dataclass(eq=False)
class _Run:
    """One run's parts, and its progress."""

    model: nn.Module
    loss: LossFunction
    options: LoopOptions
    placement: Placement
    layers: dict[str, LoraLayer]
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    steps: int
    work: Path | None
    identity: dict[str, Any]
    observer: Observer
    fingerprint: BaseFingerprint | None = None
    step: int = 0
    tokens: int = 0

    def go(
        self, stream: BatchStream, validation: Batches | None, *, resume: bool
    ) -> TrainingResult:
        if self.work is not None:
            self.work.mkdir(parents=True, exist_ok=True)
            # The base is frozen: its fingerprint is taken once, not at every checkpoint.
            self.fingerprint = fingerprint_model(self.model, list(self.layers))
        rng.seed_everything(self.options.seed)
        checkpoint = last_checkpoint(self.work) if resume and self.work else None
        log = MetricsLog(self.work) if checkpoint is None else self._resume(checkpoint, stream)
        self.observer.started(steps=self.steps, done=self.step)
        try:
            if self.step == 0:
                self._validate(validation, log)
            self._all_steps(stream, validation, log)
            if not log.validations() or log.validations()[-1][0] != self.step:
                self._validate(validation, log)
            log.sync()
        finally:
            log.close()
        return TrainingResult(self.step, self.tokens, tuple(log.losses()), tuple(log.validations()))

    def _all_steps(self, stream: BatchStream, validation: Batches | None, log: MetricsLog) -> None:
        every, save = self.options.validate_every, self.options.save_every
        groups = iter(stream)
        while self.step < self.steps:
            group = next(groups)
            if isinstance(group, EndOfEpoch):
                if not every:
                    self._validate(validation, log)
                continue
            self._one_step(group, stream.epoch, log)
            if every and self.step % every == 0:
                self._validate(validation, log)
            if self.work and save and self.step % save == 0:
                self._save(stream, log)

    def _one_step(self, group: list[Any], epoch: int, log: MetricsLog) -> None:
        step = self.step + 1
        self.optimizer.zero_grad(set_to_none=True)
        total, weight, tokens = torch.zeros((), dtype=torch.float64), 0.0, 0
        for batch in group:
            with self.placement.autocast():
                part = as_sum(self.loss(self.model, to_device(batch, self.placement.device)))
            if not part.total.requires_grad:
                raise LoraportError(
                    "the loss: expected one that depends on the LoRA layers, got one without "
                    "gradient; does the forward pass call the modules that were adapted?"
                )
            part.total.backward()  # type: ignore[no-untyped-call]
            total = total.to(self.placement.device) + part.total.detach().double()
            weight, tokens = weight + part.weight, tokens + part.tokens
        if step == 1:
            self._note_unused()
        value = float(total) / weight
        self._require_finite(step, "loss", value)
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        torch._foreach_mul_(gradients, 1 / weight)
        norm = float(
            nn.utils.clip_grad_norm_(self.parameters.values(), self.options.clip or math.inf)
        )
        self._require_finite(step, "gradient norm", norm)
        rate = learning_rate(step, self.steps, self.options.learning_rate, self.options.warmup)
        for settings in self.optimizer.param_groups:
            settings["lr"] = rate
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

    def _validate(self, validation: Batches | None, log: MetricsLog) -> None:
        if validation is None:
            return
        value = mean_loss(self.model, validation, self.loss, self.placement)
        log.add(step=self.step, validation_loss=value)
        self.observer.validated(step=self.step, loss=value)

    def _save(self, stream: BatchStream, log: MetricsLog) -> None:
        assert self.work is not None
        position = Position(self.step, stream.epoch, stream.index, self.tokens, log.sync())
        state = RunState(
            position=position,
            random=rng.capture(),
            epoch_random=stream.epoch_start,
            optimizer=optimizer_tensors(self.optimizer, self.parameters),
            identity=self.identity,
        )
        adapter = adapter_of(self.model, base_fingerprint=self.fingerprint)
        save_checkpoint(self.work, adapter, state, self.options.keep)

    def _resume(self, checkpoint: Path, stream: BatchStream) -> MetricsLog:
        adapter, state = load_checkpoint(checkpoint)
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
        return MetricsLog(self.work, position.metrics_bytes)

    def _note_unused(self) -> None:
        unused = [path for path, layer in self.layers.items() if layer.lora_B.grad is None]
        if unused:
            shown = ", ".join(unused[:5]) + (" ..." if len(unused) > 5 else "")
            self.observer.note(
                f"{len(unused)} of {len(self.layers)} LoRA layers took no part in the first "
                f"step and learn nothing unless others reach them: {shown}"
            )

    def _require_finite(self, step: int, what: str, value: float) -> None:
        if math.isfinite(value):
            return
        kept = last_checkpoint(self.work) if self.work else None
        where = f"the last checkpoint is kept: {kept}" if kept else "there is no checkpoint yet"
        raise LoraportError(
            f"step {step}: expected a finite {what}, got {value}; lower the learning rate or "
            f"look at the data; {where}"
        )


def _lora_parameters(model: nn.Module, layers: Mapping[str, LoraLayer]) -> dict[str, nn.Parameter]:
    if not layers:
        raise LoraportError("the model: expected LoRA layers, got none; call attach(model) first")
    parameters = {
        f"{path}.{name}": getattr(layer, name)
        for path, layer in layers.items()
        for name in ("lora_A", "lora_B")
        if getattr(layer, name).requires_grad
    }
    wanted = {id(parameter) for parameter in parameters.values()}
    others = [
        name for name, p in model.named_parameters() if p.requires_grad and id(p) not in wanted
    ]
    if others or not parameters:
        raise LoraportError(
            "the model: expected trainable LoRA matrices and a frozen base, got "
            + (f"trainable {', '.join(others[:5])}" if others else "only fixed layers")
        )
    return parameters


def _total_steps(batches: Batches, options: LoopOptions) -> int:
    if options.steps is not None:
        return options.steps
    if not isinstance(batches, Sized):
        raise LoraportError(
            "batches: expected a length, to know how many steps an epoch has, got none; give steps"
        )
    return options.epochs * -(-len(batches) // options.accumulate)
