"""Layers that are alike take alike: a few of them are traced, and the rest is computed.

1. Layers are alike where their modules, settings and parameters are, and what the configuration
   says of each. Gemma's repeat every few; DeepSeek's first ones are others.
2. What repeats is a unit. So many of the first layers are kept that there are four units, and
   units after them are taken out of the model: what its code does with a layer's number is true.
3. Of the changes of memory that were traced, those of the third unit, in the forward pass and in
   the backward pass, come again for each unit taken out; but only if the second's are the same.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from loraport.training.lora.inject import lora_layers
from loraport.training.lora.lora_layer import LoraLayer
from loraport.training.memory.live_bytes import LiveBytes

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_UNITS = 4  # the first and the last may be unlike those between
# Changes of memory from one place to another, and how often they come.
Piece = tuple[int, int, int]


class UnlikeError(Exception):
    """The layers are not alike after all: every one has to be traced."""


@dataclass(eq=False)
class Units:
    """How a model's layers repeat, and where in a pass each of the traced units begins.

    Attributes:
        layers: The model's.
        first: Layers before the first unit.
        period: Layers of a unit.
        kept: Layers that are traced.
        omitted: Units that are not.
        forward: Changes before each unit's forward pass.
        backward: Changes before each unit's backward pass is through, but for the first's.
        given: Changes before and after gradients were given.
        before: Bytes of a unit's gradients before the passes.
        after: The same after them.
    """

    layers: nn.ModuleList
    first: int
    period: int
    kept: int
    omitted: int
    forward: list[int] = field(default_factory=list)
    backward: list[int] = field(default_factory=list)
    given: tuple[int, int] = (0, 0)
    before: int = 0
    after: int = 0
    _twins: list[tuple[LoraLayer, LoraLayer]] = field(default_factory=list)

    def take_out(self, device: torch.device) -> None:
        """Shorten the model; matrices of what is taken out have storages without numbers.

        Args:
            device: Where they are to be.
        """
        for index in range(self.kept, len(self.layers)):
            # Of a unit in the middle.
            twin = self.first + self.period + (index - self.first) % self.period
            those = lora_layers(self.layers[twin])
            for path, layer in lora_layers(self.layers[index]).items():
                layer.to_empty(device=device, recurse=False)
                self._twins.append((layer, those[path]))
        del self.layers[self.kept :]

    @contextlib.contextmanager
    def watch(self, live: LiveBytes) -> Iterator[None]:
        """Have the units of a forward pass, and of its backward pass, note where they begin.

        Args:
            live: Counts in both.
        """
        self.forward, self.backward, self.before = [], [], self._gradients()

        def begins(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            hidden = given[0] if given else named["hidden_states"]
            self.forward.append(len(live.changes))
            if len(self.forward) > 1:
                hidden.register_hook(lambda _: self.backward.append(len(live.changes)))

        places = range(self.first, self.first + _UNITS * self.period, self.period)
        hooks = [
            self.layers[place].register_forward_pre_hook(begins, with_kwargs=True)
            for place in places
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def give_gradients(self, live: LiveBytes) -> None:
        """Give the rounded matrices of what was taken out gradients, as their twins have them.

        Args:
            live: Counts them, though they are in the changes of their units.
        """
        start = len(live.changes)
        self.after = self._gradients()
        for layer, twin in self._twins:
            for own, other in zip(layer.rounded or (), twin.rounded or (), strict=True):
                if other.grad is not None:
                    own.grad = torch.empty_like(own)
        self.given = (start, len(live.changes))

    def pieces(self, changes: list[int], start: int, turn: int) -> list[Piece]:
        """Return what a pass over the whole model changes.

        Args:
            changes: What was traced, the pass last.
            start: Where in them it begins.
            turn: Where in them the backward pass begins.

        Raises:
            UnlikeError: If a unit in the middle changes something else than another, or leaves
                more than gradients.
        """
        ahead, back = self.forward, self.backward
        if (len(ahead), len(back)) != (_UNITS, _UNITS - 1):
            raise UnlikeError
        second, third = (changes[i:j] for i, j in pairwise(ahead[1:]))
        third_back, second_back = (changes[i:j] for i, j in pairwise(back))
        # What is freed later than that is freed for the traced units alone.
        left = self.after - self.before
        if second != third or second_back != third_back or sum(second + second_back) != left:
            raise UnlikeError
        times = 1 + self.omitted
        return [
            (start, ahead[2], 1),
            (ahead[2], ahead[3], times),
            (ahead[3], turn, 1),
            (turn, back[0], 1),
            (back[0], back[1], times),
            (back[1], self.given[0], 1),
            (self.given[1], len(changes), 1),
        ]

    def _gradients(self) -> int:
        """Return the bytes of the second unit's gradients."""
        begin = self.first + self.period
        unit = nn.ModuleList(self.layers[begin : begin + self.period])
        tensors = [
            tensor
            for layer in lora_layers(unit).values()
            for tensor in (*layer.parameters(recurse=False), *(layer.rounded or ()))
        ]
        return sum(t.grad.nbytes for t in tensors if t.grad is not None)


def find_units(model: PreTrainedModel) -> Units | None:
    """Return how most of a model's layers repeat; ``None`` where none can be left out.

    Args:
        model: With LoRA layers.
    """
    outer: list[nn.ModuleList] = []
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            inside = {id(inner) for layers in outer for inner in layers.modules()}
            outer += [module] if id(module) not in inside else []
    config = model.config.get_text_config().to_dict()
    found = [units for layers in outer if (units := _units(layers, config)) is not None]
    return max(found, key=lambda units: units.omitted * units.period, default=None)


def _units(layers: nn.ModuleList, config: dict[str, Any]) -> Units | None:
    count = len(layers)
    parameters = Counter(id(p) for layer in layers for p in layer.parameters())
    if max(parameters.values(), default=2) > 1:
        return None  # layers that share a weight share its gradient
    each = [value for value in config.values() if isinstance(value, list) and len(value) == count]
    kinds = [
        (_settings(layer, number), [value[number] for value in each])
        for number, layer in enumerate(layers)
    ]
    best: Units | None = None
    for period in range(1, (count - 1) // _UNITS + 1):
        first = count - period
        while first and kinds[first - 1] == kinds[first - 1 + period]:
            first -= 1
        kept = first + _UNITS * period + (count - first) % period
        if kept < (best.kept if best else count):
            best = Units(layers, first, period, kept, (count - kept) // period)
    return best


def _settings(layer: nn.Module, number: int) -> list[Any]:
    """Return what a layer's memory may depend on, without its number."""
    found: list[Any] = []
    for path, module in layer.named_modules():
        settings = {
            name: value
            for name, value in vars(module).items()
            if isinstance(value, bool | int | float | str | list | tuple | None)
            and not ("layer" in name and type(value) is int and value == number)
        }
        tensors = [
            (name, tensor.shape, tensor.dtype, tensor.requires_grad)
            for group in (module._parameters, module._buffers)
            for name, tensor in group.items()
            if tensor is not None
        ]
        found.append((path, type(module), settings, tensors))
    return found
