"""Train candidates on one frozen base in one pass.

Each batch is repeated once per candidate, so that the base's weights are read once for all of
them; every candidate has its own matrices, optimizer, learning rate, clipping and end. What it
learns is what `loraport.training.train` would teach it alone: the same start, the same batches
in the same order. (Where the base itself drops activations at random, as GPT-2 does in training,
the dropped ones are others.)
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from loraport.errors import LoraportError
from loraport.sweep.halving import step_at
from loraport.sweep.isolation import require_rows_apart
from loraport.sweep.layers import Attached, attach_candidates
from loraport.sweep.loss import GroupLoss
from loraport.sweep.member import Member, make_member
from loraport.sweep.observer import SilentSweep, SweepObserver
from loraport.sweep.trial import Outcome, Trial
from loraport.sweep.validation import row_losses
from loraport.training import rng
from loraport.training.devices import Placement, choose_placement, to_device
from loraport.training.distributed.stream import Batches, BatchStream, EndOfEpoch
from loraport.training.kernels.cuda_graphs import RecordedPasses, Trained
from loraport.training.kernels.fused_norms import fused_norms
from loraport.training.kernels.recorder import Recorder
from loraport.training.lora.rounded import RoundedMatrices
from loraport.training.modes import training_mode
from loraport.training.options import LoopOptions
from loraport.training.run.checkpoints import Position
from loraport.training.run.faults import data_lines
from loraport.training.run.interruption import Stopped, StopRequest, stop_requests
from loraport.training.run.optimizer import set_learning_rate
from loraport.training.run.schedule import learning_rate, total_steps

# Puts outcomes where they outlast the process.
Keep = Callable[[Mapping[str, Outcome]], None]


def train_together(
    model: nn.Module,
    trials: Sequence[Trial],
    batches: Batches,
    loss: GroupLoss,
    options: LoopOptions | None = None,
    *,
    validation: Batches | None = None,
    until: float = 1.0,
    starts: Mapping[str, Outcome] | None = None,
    keep: Keep | None = None,
    observer: SweepObserver | None = None,
    recorder: Recorder | None = None,
) -> dict[str, Outcome]:
    """Train candidates together; one that fails is dropped and harms no other.

    Args:
        model: The base, without LoRA layers; it is left as it was, on the device.
        trials: The candidates; each has its own learning rate, the rest is ``options``.
        batches: As for `loraport.training.train`; each is one candidate's batch.
        loss: Gives each candidate's losses on a batch.
        options: How the loop steps.
        validation: Batches for the validation losses.
        until: The share of the steps after which candidates pause, validated.
        starts: Name → outcome of a candidate that paused, to go on from there; in company only of
            others that took as many steps.
        keep: Given all outcomes so far every ``save_every`` steps, and after SIGINT, SIGTERM or
            SIGHUP.
        observer: Told what happens.
        recorder: Records the passes of each shape of batch, where that can be told to work (see
            `loraport.training.kernels.cuda_graphs`); the loss then takes ``hidden``, too.

    Returns:
        Name → what came of it, in the order of the trials.

    Raises:
        LoraportError: If names are not unique, targets match nothing, or the model's rows depend
            on each other.
        Stopped: After SIGINT, SIGTERM or SIGHUP, where outcomes are kept.
    """
    options, starts = options or LoopOptions(), starts or {}
    if len({trial.name for trial in trials}) < len(trials) or not trials:
        raise LoraportError("trials: expected some, each with a name of its own")
    placement = choose_placement(options.device, options.dtype)
    model.to(placement.device)
    rng.seed_everything(options.seed)
    attached = attach_candidates(model, {trial.name: trial.lora for trial in trials})
    try:
        run = _GroupRun(
            attached=attached,
            loss=loss,
            options=options,
            placement=placement,
            observer=observer or SilentSweep(),
            steps=total_steps(batches, options),
            stream=BatchStream(batches, options.accumulate),
            keep=keep,
            recorder=recorder,
            members=[make_member(trial, attached, options, placement) for trial in trials],
        )
        run.resume(starts)
        with (
            training_mode(model),
            placement.attention(),
            fused_norms(model, placement.device),
            contextlib.nullcontext() if recorder is None else recorder.stream(),
            stop_requests(active=keep is not None) as run.stop,
        ):
            return run.go(validation, step_at(run.steps, until))
    finally:
        attached.detach()


@dataclass(eq=False)
class _GroupRun:
    """One group's parts, and its progress."""

    attached: Attached
    loss: GroupLoss
    options: LoopOptions
    placement: Placement
    observer: SweepObserver
    steps: int
    stream: BatchStream
    keep: Keep | None
    recorder: Recorder | None
    members: list[Member]
    step: int = 0
    running: list[Member] = field(default_factory=list)
    stop: StopRequest = field(default_factory=StopRequest)
    rounded: RoundedMatrices = field(init=False)
    training_loss: GroupLoss = field(init=False)

    def resume(self, starts: Mapping[str, Outcome]) -> None:
        """Go on from where candidates stood, if any did."""
        states = [start.state for start in starts.values() if start.state is not None]
        positions = {state.position for state in states}
        if not positions:
            return
        if len(positions) > 1 or len(states) < len(self.members):
            raise LoraportError("candidates: expected all to go on after the same step")
        for member in self.members:
            member.resume(starts[member.name])
        first = states[0]
        self.step = first.position.step
        self.stream.seek(first.position.epoch, first.position.index, first.epoch_random)
        rng.restore(first.random)

    def go(self, validation: Batches | None, end: int) -> dict[str, Outcome]:
        names = [member.name for member in self.members]
        self.observer.group_started(names=names, steps=self.steps, done=self.step)
        groups: Iterator[list[Any] | EndOfEpoch] = iter(self.stream)
        if self.step < end:
            ahead = [next(groups)]
            while isinstance(group := ahead[-1], EndOfEpoch):
                ahead.append(next(groups))
            self._check_rows(group[0])
            groups = itertools.chain(ahead, groups)
        if self.step == 0:
            self._validate_base(validation)
        self._set_running(self.members)
        every = self.options.validate_every
        while self.step < end and self.running:
            group = next(groups)
            if isinstance(group, EndOfEpoch):
                if not every:
                    self._validate(validation)
                continue
            self._one_step(group)
            if every and self.step % every == 0:
                self._validate(validation)
            save = self.options.save_every
            if self.step < end and (self.stop.signal_number or (save and self.step % save == 0)):
                self._keep(self._outcomes())
        self._validate(validation)
        outcomes = self._outcomes()
        if self.stop.signal_number:
            self._keep(outcomes)
        return outcomes

    def _keep(self, outcomes: Mapping[str, Outcome]) -> None:
        if self.keep is not None:
            self.keep(outcomes)
        if self.stop.signal_number:
            raise Stopped(self.stop.signal_number, self.step)

    def _outcomes(self) -> dict[str, Outcome]:
        position = Position(self.step, self.stream.epoch, self.stream.index)
        return {
            member.name: member.outcome(self.steps, position, self.stream.epoch_start)
            for member in self.members
        }

    def _check_rows(self, batch: Any) -> None:
        before = rng.capture()
        batch = to_device(batch, self.placement.device)
        require_rows_apart(self.attached, batch, self.loss, self.placement)
        rng.restore(before)

    def _one_step(self, group: list[Any]) -> None:
        step, count = self.step + 1, len(self.running)
        self.attached.clear_gradients()
        sums = torch.zeros(count, dtype=torch.float64, device=self.placement.device)
        weight, tokens = 0, 0
        for batch in group:
            placed = to_device(batch, self.placement.device)
            with self.rounded.provided():
                with self.placement.autocast():
                    part = self.training_loss(self.attached.model, placed, count)
                # Rows do not mix: each candidate's gradients come from its own losses alone.
                part.totals.sum().backward()  # type: ignore[no-untyped-call]
            sums += part.totals.detach().double().sum(dim=1)
            weight, tokens = weight + sum(part.weights), tokens + part.tokens
        self.attached.hand_out_gradients()
        if not weight:
            raise LoraportError("the loss: expected something that counts in a batch, got nothing")
        norms = self._norms(1 / weight)
        # Read together: this is where a GPU is waited for, once a step.
        totals, read_norms = torch.stack([sums, norms.to(sums)]).tolist()
        ended = []
        for member, total, norm in zip(self.running, totals, read_norms, strict=True):
            value = total / weight
            for what, number in (("loss", value), ("gradient norm", norm)):
                if not math.isfinite(number) and member not in ended:
                    self._break_off(
                        member, f"step {step}: its {what} was {number}{data_lines(group)}"
                    )
                    ended.append(member)
        for member, total, norm_tensor in zip(self.running, totals, norms, strict=True):
            if member not in ended:
                self._update(member, step, norm_tensor)
                member.losses.append((step, total / weight))
        self.step = step
        losses = {m.name: m.losses[-1][1] for m in self.running if m not in ended}
        self.observer.stepped(step=step, losses=losses, tokens=tokens * count)
        self._end(ended)

    def _norms(self, factor: float) -> torch.Tensor:
        """Scale the gradients of all candidates; return their norms ``[count]``."""
        norms = []
        for member in self.running:
            gradients = [p.grad for p in member.parameters.values() if p.grad is not None]
            torch._foreach_mul_(gradients, factor)
            norms.append(nn.utils.get_total_norm(gradients))
        return torch.stack(norms)

    def _update(self, member: Member, step: int, norm: torch.Tensor) -> None:
        nn.utils.clip_grads_with_norm_(
            member.parameters.values(), self.options.clip or math.inf, norm
        )
        peak, warmup = member.trial.learning_rate, self.options.warmup
        set_learning_rate(member.optimizer, learning_rate(step, self.steps, peak, warmup))
        member.optimizer.step()

    def _validate(self, validation: Batches | None) -> None:
        """Validate what runs, unless that was done after this step."""
        if validation is None or all(m.validations[-1][0] == self.step for m in self.running):
            return
        totals, weights = row_losses(
            self.attached.model, validation, self.loss, self.placement, len(self.running)
        )
        count = sum(weights)
        ended = []
        for member, rows in zip(self.running, totals, strict=True):
            value = sum(rows) / count
            if not math.isfinite(value):
                self._break_off(member, f"step {self.step}: its validation loss was {value}")
                ended.append(member)
                continue
            member.validations.append((self.step, value))
            member.early.see(self.step, value)
            if member.early.best_step == self.step:
                member.row_losses, member.row_weights = tuple(rows), tuple(weights)
            if self.options.early_stopping and member.early.exhausted:
                member.ended = f"step {self.step}: its validation loss fell no more"
                ended.append(member)
        last = {m.name: m.validations[-1] for m in self.running}
        losses = {name: loss for name, (step, loss) in last.items() if step == self.step}
        self.observer.validated(step=self.step, losses=losses)
        self._end(ended)

    def _break_off(self, member: Member, reason: str) -> None:
        """End one that cannot go on; as in `train`, early stopping keeps a best there was."""
        member.failed = not self.options.early_stopping or member.early.best_step is None
        member.ended = reason

    def _validate_base(self, validation: Batches | None) -> None:
        """Measure the base once: at the start every candidate is the base."""
        if validation is None:
            return
        (rows,), weights = row_losses(self.attached.model, validation, self.loss, self.placement, 1)
        value = sum(rows) / sum(weights)
        if not math.isfinite(value):
            raise LoraportError(f"the base: expected a finite validation loss, got {value}")
        for member in self.members:
            member.validations.append((0, value))
        self.observer.validated(step=0, losses={"base": value})

    def _end(self, ended: list[Member]) -> None:
        if not ended:
            return
        for member in ended:
            self.observer.ended(name=member.name, reason=member.ended)
        self._set_running([member for member in self.running if member not in ended])

    def _set_running(self, members: list[Member]) -> None:
        self.running = list(members)
        self.attached.set_present([member.name for member in members])
        matrices = self.attached.matrices()
        self.rounded = RoundedMatrices(matrices, self.placement.dtype)
        self.training_loss = self.loss
        if self.recorder is not None and members:
            trained = Trained(self.attached.leaves(), matrices)
            record = self.recorder.anew()
            hidden = RecordedPasses(
                self.attached.model,
                record,
                trained=trained,
                tentative=True,
                note=self.observer.note,
            )
            self.training_loss = partial(self.loss, hidden=hidden)
