"""One frozen module of the base with the LoRA layers of several candidates beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import torch
from torch import nn

from loraport.errors import LoraportError
from loraport.sweep.stacked import Stack, add_stacked, stacked_linear
from loraport.training.lora.inject import (
    BeforeAttach,
    freeze,
    insert,
    new_layers,
    refuse_attached,
    unfreeze,
)
from loraport.training.lora.layers import LoraLinear
from loraport.training.lora.lora_layer import LoraLayer
from loraport.training.lora.rounded import Matrices
from loraport.training.options import LoraOptions


@dataclass
class Present:
    """Which candidates a batch holds rows of, in the rows' order; shared by all layers.

    Attributes:
        names: The candidates; with none, every layer is its base alone.
    """

    names: tuple[str, ...] = ()


class CandidatesLayer(nn.Module):
    """A base module whose output gets each candidate's own update on that candidate's rows.

    Attributes the layer lacks are the base module's, as with `LoraLayer`.

    Args:
        base_layer: The module adapted.
        members: Candidate → its LoRA layer; those that do not adapt this module are missing.
        present: Shared with the other layers.

    Attributes:
        stacks: The matrices of those who are present, where they are multiplied together.
    """

    stacks: tuple[Stack, ...] = ()

    def __init__(
        self, base_layer: nn.Module, members: Mapping[str, LoraLayer], present: Present
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        # Not registered: the candidates' parameters are no part of the model.
        self._members = members
        self._present = present

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer":
                raise
            return getattr(super().__getattr__("base_layer"), name)

    def arrange(self) -> None:
        """Prepare for the candidates that are present; to be called whenever they change."""

    def hand_out_gradients(self) -> None:
        """Hand the gradients to the candidates' own parameters."""

    def clear_gradients(self) -> None:
        """Forget the gradients of what is not the candidates' own."""

    def leaves(self) -> list[torch.Tensor]:
        """Return what gets gradients, of those who are present."""
        there = [self._members[name] for name in self._present.names if name in self._members]
        return [p for member in there for p in _own_parameters(member)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the adapted output, in the base's dtype.

        Args:
            x: The base module's input, its rows grouped by candidate.
        """
        base: torch.Tensor = self.base_layer(x)
        names = self._present.names
        if not any(name in self._members for name in names):
            return base
        _require_groups(x, len(names))
        updated = [
            part if name not in self._members else _adapted(self._members[name], part, rows)
            for name, part, rows in zip(
                names, base.chunk(len(names)), x.chunk(len(names)), strict=True
            )
        ]
        return torch.cat(updated).to(base.dtype)


class CandidatesLinear(CandidatesLayer):
    """The same beside ``nn.Linear``, with the candidates' matrices in stacks.

    The members' ``lora_A`` and ``lora_B`` are views into the stacks, so an optimizer of one
    candidate changes its part and nothing else.
    """

    def arrange(self) -> None:
        """Stack the matrices of present candidates, side by side where their ranks agree."""
        there = [
            (index, self._members[name])
            for index, name in enumerate(self._present.names)
            if name in self._members
        ]
        stacks = []
        # Neighbours: their places are consecutive, so place - order among them is the same.
        numbered = [(index - order, m.rank, index, m) for order, (index, m) in enumerate(there)]
        for _, run in groupby(numbered, key=lambda entry: entry[:2]):
            members = [(index, member) for _, _, index, member in run]
            stacks.append(_stack(members))
        self.stacks = tuple(stacks)

    def hand_out_gradients(self) -> None:
        """Make each member's gradients views of the stacks'."""
        names = self._present.names
        for stack in self.stacks:
            for at, name in enumerate(names[stack.first : stack.last]):
                member = self._members[name]
                member.lora_A.grad = None if stack.a.grad is None else stack.a.grad[at]
                member.lora_B.grad = None if stack.b.grad is None else stack.b.grad[at]

    def clear_gradients(self) -> None:
        """Forget the gradients of the stacks."""
        for stack in self.stacks:
            stack.a.grad = stack.b.grad = None

    def leaves(self) -> list[torch.Tensor]:
        """Return the stacks' matrices."""
        return [matrix for stack in self.stacks for matrix in (stack.a, stack.b)]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the adapted output, in the base's dtype.

        Args:
            x: ``[count * b, ..., in]``.
        """
        count = len(self._present.names)
        if not count or not self.stacks:
            base: torch.Tensor = self.base_layer(x)
            return base
        _require_groups(x, count)
        layer = cast(nn.Linear, self.base_layer)
        if type(layer) is nn.Linear and layer.weight.dtype.is_floating_point:
            return stacked_linear(x, layer.weight, layer.bias, count, self.stacks)
        return add_stacked(layer(x), x, count, self.stacks)


@dataclass(frozen=True, eq=False)
class Attached:
    """What `attach_candidates` put into a model.

    Attributes:
        model: The model.
        present: Whose rows a batch holds; nobody's at first.
        members: Candidate → module path → its LoRA layer.
        layers: The layers that hold them; none for a single candidate, whose own are in the model.
        before: What `detach` restores.
    """

    model: nn.Module
    present: Present
    members: Mapping[str, Mapping[str, LoraLayer]]
    layers: tuple[CandidatesLayer, ...]
    before: BeforeAttach

    def set_present(self, names: Sequence[str]) -> None:
        """Say whose rows the next batches hold, in their order."""
        self.present.names = tuple(names)
        for layer in self.layers:
            layer.arrange()

    def matrices(self) -> Sequence[Matrices]:
        """Return all that has an A and a B, for those who are present."""
        if self.layers:
            return [stack for layer in self.layers for stack in layer.stacks]
        return self._own_layers()

    def leaves(self) -> list[torch.Tensor]:
        """Return what gets gradients, of those who are present."""
        if self.layers:
            return [leaf for layer in self.layers for leaf in layer.leaves()]
        return [p for member in self._own_layers() for p in _own_parameters(member)]

    def clear_gradients(self) -> None:
        """Forget all gradients."""
        for layer in self.layers:
            layer.clear_gradients()
        for member in self._own_layers():
            for parameter in member.parameters(recurse=False):
                parameter.grad = None

    def hand_out_gradients(self) -> None:
        """Give every candidate's parameters their gradients."""
        for layer in self.layers:
            layer.hand_out_gradients()

    def detach(self) -> None:
        """Take all layers out: the model is as it was."""
        for parent in list(self.model.modules()):
            for name, child in parent._modules.items():
                if isinstance(child, CandidatesLayer | LoraLayer):
                    parent._modules[name] = child.base_layer
        unfreeze(self.model, self.before)

    def _own_layers(self) -> list[LoraLayer]:
        return [layer for member in self.members.values() for layer in member.values()]


def attach_candidates(model: nn.Module, candidates: Mapping[str, LoraOptions]) -> Attached:
    """Freeze a model and put the LoRA layers of several candidates into it.

    Every candidate starts as `attach` alone would start it; a single one is put there like that.

    Args:
        model: The base, on the device where it is to train.
        candidates: Name → what is adapted.

    Raises:
        LoraportError: If the model has LoRA layers already, a selection fails, or a candidate
            asks for what cannot be shared.
    """
    refuse_attached(model)
    present = Present()
    members: dict[str, dict[str, LoraLayer]] = {}
    for name, options in candidates.items():
        if options.dropout and len(candidates) > 1:
            raise LoraportError(f"{name}: expected no dropout in company, got {options.dropout}")
        members[name] = new_layers(model, options)
    layers = () if len(members) == 1 else _candidates_layers(members, present)
    before = freeze(model)
    insert(model, layers or [layer for each in members.values() for layer in each.values()])
    return Attached(model, present, members, layers, before)


def _candidates_layers(
    members: Mapping[str, Mapping[str, LoraLayer]], present: Present
) -> tuple[CandidatesLayer, ...]:
    layers: list[CandidatesLayer] = []
    for path in dict.fromkeys(path for each in members.values() for path in each):
        here = {name: each[path] for name, each in members.items() if path in each}
        first = next(iter(here.values()))
        made = CandidatesLinear if all(map(_plain, here.values())) else CandidatesLayer
        layers.append(made(first.base_layer, here, present))
    return tuple(layers)


def _plain(layer: LoraLayer) -> bool:
    """Tell whether two matrices beside a linear module are all that a layer is."""
    return type(layer) is LoraLinear and layer.magnitude is None and layer.initial_A is None


def _own_parameters(layer: LoraLayer) -> list[torch.Tensor]:
    return [p for p in layer.parameters(recurse=False) if p.requires_grad]


def _adapted(layer: LoraLayer, base: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return layer.refined(base + layer.low_rank(x))


def _stack(members: Sequence[tuple[int, LoraLayer]]) -> Stack:
    first = members[0][1]
    a = torch.stack([member.lora_A.detach() for _, member in members]).requires_grad_(True)
    b = torch.stack([member.lora_B.detach() for _, member in members]).requires_grad_(True)
    for at, (_, member) in enumerate(members):
        member.lora_A.data, member.lora_B.data = a.detach()[at], b.detach()[at]
    scalings = [member.scaling for _, member in members]
    scaling = torch.tensor(scalings, dtype=first.lora_A.dtype)
    return Stack(
        first=members[0][0],
        last=members[-1][0] + 1,
        scaling=scaling.to(a.device).reshape(-1, 1, 1),
        a=a,
        b=b,
        factor=scalings[0] if len(set(scalings)) == 1 else None,
    )


def _require_groups(x: torch.Tensor, count: int) -> None:
    if x.shape[0] % count:
        raise LoraportError(
            f"a layer's input of shape {list(x.shape)}: expected rows of {count} candidates, all "
            "of one number; this model mixes rows, so its candidates have to train one by one: "
            "--together 1"
        )
