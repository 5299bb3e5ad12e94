"""Stop when the validation loss no longer falls, and keep what was best."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import torch
from torch import nn


class EarlyStopping:
    """Watches validation losses and remembers the parameters of the best one.

    The base alone (step 0) is no candidate: it is what the adapter has to beat.

    Args:
        patience: Validations in a row without a new best after which to stop; one that is not
            finite uses it up.
        parameters: Name → what is trained.

    Attributes:
        best: Name → the parameters at the best validation, on the CPU; empty before any.
        best_step: Its step, or ``None``.
    """

    def __init__(self, patience: int, parameters: Mapping[str, nn.Parameter]) -> None:
        self._patience = patience
        self._parameters = parameters
        self._loss = float("inf")
        self._waited = 0
        self.best: dict[str, torch.Tensor] = {}
        self.best_step: int | None = None

    @property
    def exhausted(self) -> bool:
        """Whether the patience is used up."""
        return self._waited >= self._patience

    def see(self, step: int, loss: float) -> None:
        """Take note of a validation of the present parameters."""
        if self._judge(step, loss):
            self.best = {name: p.detach().cpu().clone() for name, p in self._parameters.items()}

    def resume(
        self, validations: Iterable[tuple[int, float]], best: Mapping[str, torch.Tensor]
    ) -> None:
        """Continue after the validations there were, with the tensors of the best of them."""
        for step, loss in validations:
            self._judge(step, loss)
        self.best = dict(best)

    @torch.no_grad()
    def restore_best(self) -> None:
        """Put the best parameters back."""
        for name, tensor in self.best.items():
            self._parameters[name].copy_(tensor)

    def _judge(self, step: int, loss: float) -> bool:
        if step == 0:
            return False
        better = loss < self._loss
        if better:
            self._loss, self.best_step = loss, step
        # What is NaN or infinite once does not come back.
        more = self._waited + 1 if math.isfinite(loss) else self._patience
        self._waited = 0 if better else more
        return better
