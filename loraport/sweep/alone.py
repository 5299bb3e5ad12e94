"""Train one candidate by itself, exactly as ``loraport train`` would, and measure it by rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from loraport.sweep.loss import grouped_language_model_loss
from loraport.sweep.observer import SweepObserver
from loraport.sweep.trial import Outcome, Trial
from loraport.sweep.validation import row_losses
from loraport.training.devices import choose_placement
from loraport.training.faults import NotFiniteError
from loraport.training.inject import attach, detach, lora_layers, lora_module
from loraport.training.language_model import language_model_loss
from loraport.training.loop import train
from loraport.training.options import LoopOptions
from loraport.training.schedule import total_steps
from loraport.training.stream import EpochBatches


def train_alone(
    model: nn.Module,
    trial: Trial,
    batches: EpochBatches,
    options: LoopOptions,
    *,
    validation: EpochBatches,
    work: Path | None,
    observer: SweepObserver,
) -> Outcome:
    """Train one candidate; the best validated step is kept, as in a group.

    Args:
        model: The base, without LoRA layers; left so.
        trial: The candidate.
        batches: To train on.
        options: The learning rate among them is not looked at.
        validation: To validate with.
        work: Directory of its checkpoints, from which it continues; ``None`` for none.
        observer: Told what happens.

    Raises:
        LoraportError: As `loraport.training.loop.train`, but for losses that are not finite.
        Stopped: After SIGINT or SIGTERM, where there is a ``work`` directory.
    """
    told = _Told(trial.name, observer)
    # A patience that never ends: the best is kept, and nothing stops early.
    patience = options.early_stopping or total_steps(batches, options) + 1
    own = replace(options, learning_rate=trial.learning_rate, early_stopping=patience)
    attach(model, trial.lora)
    try:
        result = train(
            model,
            batches,
            language_model_loss,
            own,
            validation=validation,
            work=work,
            resume=work is not None,
            observer=told,
        )
        placement = choose_placement(options.device, options.dtype)
        (rows,), weights = row_losses(model, validation, grouped_language_model_loss, placement, 1)
        steps = total_steps(batches, options)
        stopped = f"step {result.steps}: its validation loss fell no more"
        return Outcome(
            name=trial.name,
            losses=result.losses,
            validations=result.validations,
            best=result.kept,
            row_losses=tuple(rows),
            row_weights=tuple(weights),
            modules={path: lora_module(layer) for path, layer in lora_layers(model).items()},
            ended=stopped if result.steps < steps else "",
        )
    except NotFiniteError as error:
        reason = str(error).split(";")[0]
        observer.ended(name=trial.name, reason=reason)
        return Outcome(
            name=trial.name,
            losses=tuple(told.losses),
            validations=tuple(told.validations),
            ended=reason,
            failed=True,
        )
    finally:
        detach(model)


class _Told:
    """Tells a sweep's observer what the loop tells of one candidate."""

    def __init__(self, name: str, observer: SweepObserver) -> None:
        self._name = name
        self._observer = observer
        self.losses: list[tuple[int, float]] = []
        self.validations: list[tuple[int, float]] = []

    def started(self, *, steps: int, done: int) -> None:
        self._observer.group_started(names=[self._name], steps=steps, done=done)

    def stepped(self, *, step: int, loss: float, learning_rate: float, tokens: int) -> None:
        del learning_rate
        self.losses.append((step, loss))
        self._observer.stepped(step=step, losses={self._name: loss}, tokens=tokens)

    def validated(self, *, step: int, loss: float) -> None:
        self.validations.append((step, loss))
        self._observer.validated(step=step, losses={self._name if step else "base": loss})

    def note(self, text: str) -> None:
        self._observer.note(text)

    def finished(self) -> None:
        """Say nothing: the sweep goes on."""
