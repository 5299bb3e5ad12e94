"""The modules of a checkpoint, known from its configuration; weights are read when compared.

transformers tells on a model without weights which modules there are and how the checkpoint names
their tensors. Where it cannot, the model is loaded as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from converters.onnx.modules.slottable import SlottableModule, slottable_modules, stored_modules
from loraport.fingerprint import BaseFingerprint, fingerprint
from loraport.naming import weight_name

if TYPE_CHECKING:
    import torch
    from torch import nn

    from converters.merge.layout import BaseLayout
    from loraport.base.checkpoint import Checkpoint


@dataclass(frozen=True, eq=False)
class BaseModules:
    """What can have a slot in a base.

    Attributes:
        modules: By path, in the model's order.
        stored_weight: Gives a module's weight as the model has it.
    """

    modules: Mapping[str, SlottableModule]
    stored_weight: Callable[[str], torch.Tensor]

    def fingerprint(self, paths: Iterable[str]) -> BaseFingerprint:
        """Fingerprint some of the modules, reading one after the other."""
        return fingerprint([path for path in paths if path in self.modules], self.stored_weight)


def modules_of(model: nn.Module) -> BaseModules:
    """Return the modules of a model that is loaded."""

    def stored(path: str) -> torch.Tensor:
        weight: torch.Tensor = model.get_parameter(weight_name(path))
        return weight

    return BaseModules(slottable_modules(model), stored)


def open_base_modules(base: str) -> BaseModules:
    """Return the modules of a base; of a safetensors checkpoint without reading its weights.

    Args:
        base: See `loraport.base.finding.resolve_base`.

    Raises:
        LoraportError: If there is no such base or it cannot be read.
    """
    from loraport.base.finding import resolve_base
    from loraport.base.loading import load_model

    directory = resolve_base(base)
    stored = any(directory.glob("*.safetensors"))
    found = _of_checkpoint(directory) if stored else None
    return found if found is not None else modules_of(load_model(str(directory)))


def _of_checkpoint(directory: Path) -> BaseModules | None:
    """Return the modules of a checkpoint, or ``None`` where only a loaded model tells."""
    from converters.merge.layout import base_layout
    from loraport.base.checkpoint import Checkpoint
    from loraport.base.config import read_model_config
    from loraport.base.loading import model_without_weights

    model = model_without_weights(directory)
    if model is None or read_model_config(directory).get("quantization_config"):
        return None
    checkpoint = Checkpoint(directory)
    layout = base_layout(directory, {name: checkpoint.info(name).shape for name in checkpoint})
    if layout.model_class != type(model).__name__:
        return None
    tensors = _tensors(slottable_modules(model), layout, checkpoint)
    return BaseModules(
        stored_modules(model, tensors, checkpoint),
        lambda path: checkpoint.load(tensors[path]).float(),
    )


def _tensors(paths: Iterable[str], layout: BaseLayout, checkpoint: Checkpoint) -> dict[str, str]:
    """Return the tensor that is each module's weight; one that the checkpoint lacks has none."""
    ties = {name: group for group in layout.tied for name in group}
    found = {}
    for path in paths:
        parameter = weight_name(path)
        names = (parameter, *ties.get(parameter, ()))
        stored = next((name for name in names if name in layout.pieces), None)
        pieces = layout.pieces[stored] if stored is not None else ()
        if len(pieces) != 1 or pieces[0].expert is not None:
            continue
        if checkpoint.info(pieces[0].tensor).shape == layout.shapes.get(parameter):
            found[path] = pieces[0].tensor
    return found
