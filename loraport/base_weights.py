"""Single weights of a base, for adapters that depend on them (DoRA, trained tokens)."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from loraport.base_model import load_model, resolve_base
from loraport.checkpoint import Checkpoint
from loraport.errors import LoraportError
from loraport.naming import NameIndex, weight_name

if TYPE_CHECKING:
    import torch
    from torch import nn


class StoredWeights:
    """A base's weights as they are stored, each read when it is asked for.

    The whole model is loaded only where the checkpoint has other names, or no plain floats.

    Args:
        base: See `resolve_base`.

    Raises:
        LoraportError: If there is no such base.
    """

    def __init__(self, base: str) -> None:
        self.base = base
        self._directory = resolve_base(base)

    def __call__(self, path: str) -> torch.Tensor:
        """Return a module's weight.

        Raises:
            LoraportError: If the base has no such module.
        """
        return self.parameter(weight_name(path))

    def parameter(self, name: str) -> torch.Tensor:
        """Return a parameter by its path.

        Raises:
            LoraportError: If the base has none of this name.
        """
        if self._checkpoint is not None:
            names = self._names.candidates(name)
            if len(names) == 1:
                found = self._checkpoint.load(names[0])
                if found.is_floating_point():
                    return found
        try:
            found = self._model.get_parameter(name)
        except AttributeError as error:
            raise LoraportError(
                f"{name}: expected this parameter in the base {self.base}, got none; give --base "
                "with the model that the adapter was trained on"
            ) from error
        return found.detach()

    @cached_property
    def _checkpoint(self) -> Checkpoint | None:
        try:
            return Checkpoint(self._directory)
        except LoraportError:
            return None  # other files than safetensors, which transformers may read

    @cached_property
    def _names(self) -> NameIndex:
        return NameIndex(self._checkpoint or ())

    @cached_property
    def _model(self) -> nn.Module:
        model: nn.Module = load_model(self.base)
        return model
