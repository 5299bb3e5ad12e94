"""One candidate of a group that trains together: its parameters, its optimizer, its course."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn

from loraport.sweep.layers import Attached
from loraport.sweep.trial import Outcome, Trial
from loraport.training.devices import Placement
from loraport.training.early_stopping import EarlyStopping
from loraport.training.inject import lora_module
from loraport.training.lora_layer import LoraLayer
from loraport.training.optimizer import make_optimizer
from loraport.training.options import LoopOptions


@dataclass(eq=False)
class Member:
    """One candidate's own state.

    Attributes:
        trial: What it is.
        layers: Module path → its LoRA layer.
        parameters: Name → what is trained.
        optimizer: Of its parameters alone.
        early: Watches its validation losses and keeps its best parameters.
        losses: Step and mean training loss.
        validations: Step and validation loss; step 0 is the base alone.
        row_losses: Summed loss of each validation row at the best step.
        row_weights: How many losses each of them sums.
        ended: Why it ended early; empty while it runs.
        failed: It ended because it could not go on.
    """

    trial: Trial
    layers: dict[str, LoraLayer]
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    early: EarlyStopping
    losses: list[tuple[int, float]] = field(default_factory=list)
    validations: list[tuple[int, float]] = field(default_factory=list)
    row_losses: tuple[float, ...] = ()
    row_weights: tuple[int, ...] = ()
    ended: str = ""
    failed: bool = False

    @property
    def name(self) -> str:
        """The trial's name."""
        return self.trial.name

    def outcome(self) -> Outcome:
        """Return what came of it; its best parameters are put back."""
        best = next((v for v in self.validations if v[0] == self.early.best_step), None)
        self.early.restore_best()
        # A candidate that failed before its first validation has nothing worth keeping.
        usable = best is not None or not self.failed
        return Outcome(
            name=self.name,
            losses=tuple(self.losses),
            validations=tuple(self.validations),
            best=best,
            row_losses=self.row_losses,
            row_weights=self.row_weights,
            modules={p: lora_module(layer) for p, layer in self.layers.items()} if usable else None,
            ended=self.ended,
            failed=self.failed,
        )


def make_member(
    trial: Trial, attached: Attached, options: LoopOptions, placement: Placement
) -> Member:
    """Return a candidate at its start.

    Args:
        trial: What it is.
        attached: The model that holds its layers.
        options: The learning rate among them is not looked at.
        placement: Where its parameters are.
    """
    layers = dict(attached.members[trial.name])
    parameters = {
        f"{path}.{name}": parameter
        for path, layer in layers.items()
        for name, parameter in layer.named_parameters(recurse=False)
    }
    return Member(
        trial=trial,
        layers=layers,
        parameters=parameters,
        optimizer=make_optimizer(parameters, options, placement.device),
        early=EarlyStopping(options.early_stopping, parameters),
    )
