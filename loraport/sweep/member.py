"""One candidate of a group that trains together: its parameters, its optimizer, its course."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from loraport.sweep.layers import Attached
from loraport.sweep.trial import Outcome, Trial
from loraport.training import rng
from loraport.training.devices import Placement
from loraport.training.lora.inject import lora_module
from loraport.training.lora.lora_layer import LoraLayer
from loraport.training.options import LoopOptions
from loraport.training.rng import RandomState
from loraport.training.run.checkpoints import Position, RunState
from loraport.training.run.early_stopping import EarlyStopping
from loraport.training.run.optimizer import make_optimizer, optimizer_tensors, restore_optimizer


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

    def outcome(self, steps: int, position: Position, epoch_random: RandomState) -> Outcome:
        """Return what came of it so far, with its best parameters and where it stands.

        Args:
            steps: How many it takes in all.
            position: Where the batches stand.
            epoch_random: State of the random generators when the epoch began.
        """
        state = None
        if not self.ended and position.step < steps:
            state = RunState(
                position=position,
                random=rng.capture(),
                epoch_random=epoch_random,
                optimizer=_on_cpu(optimizer_tensors(self.optimizer, self.parameters)),
                identity={},
                best=self.early.best,
                parameters=_copies(self._tensors()),
            )
        best = next((v for v in self.validations if v[0] == self.early.best_step), None)
        self.early.restore_best()
        # A candidate that failed before its first validation has nothing worth keeping.
        usable = best is not None or not self.failed
        modules = {path: lora_module(layer) for path, layer in self.layers.items()}
        if state is not None:
            self._put_back(state.parameters)
        return Outcome(
            name=self.name,
            losses=tuple(self.losses),
            validations=tuple(self.validations),
            best=best,
            row_losses=self.row_losses,
            row_weights=self.row_weights,
            modules=modules if usable else None,
            ended=self.ended,
            failed=self.failed,
            steps=steps,
            paused=state is not None,
            state=state,
        )

    def resume(self, outcome: Outcome) -> None:
        """Go on from where a candidate stood."""
        state = outcome.state
        assert state is not None
        self.losses, self.validations = list(outcome.losses), list(outcome.validations)
        self.row_losses, self.row_weights = outcome.row_losses, outcome.row_weights
        self._put_back(state.parameters)
        restore_optimizer(self.optimizer, self.parameters, state.optimizer)
        self.early.resume(outcome.validations, state.best)

    def _tensors(self) -> dict[str, torch.Tensor]:
        """Return what is trained, and what another machine would compute with other roundings."""
        fixed = {
            f"{path}.{name}": tensor
            for path, layer in self.layers.items()
            for name, tensor in (("initial_A", layer.initial_A), ("initial_B", layer.initial_B))
            if tensor is not None
        }
        return {**self.parameters, **fixed}

    @torch.no_grad()
    def _put_back(self, tensors: Mapping[str, torch.Tensor]) -> None:
        for name, present in self._tensors().items():
            present.copy_(tensors[name])


def _copies(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}


def _on_cpu(
    entries: Mapping[str, Mapping[str, torch.Tensor]],
) -> dict[str, dict[str, torch.Tensor]]:
    return {name: _copies(tensors) for name, tensors in entries.items()}


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
