"""Single weights of a base, for adapters that depend on them (DoRA, trained tokens)."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from loraport.base.checkpoint import Checkpoint
from loraport.base.config import read_model_config
from loraport.base.finding import resolve_base
from loraport.base.loading import load_model_as_it_is
from loraport.errors import LoraportError
from loraport.naming import NameIndex, weight_name

if TYPE_CHECKING:
    import torch
    from torch import nn

_PLAIN = ("F64", "F32", "F16", "BF16")  # safetensors' names


class StoredWeights:
    """A base's weights as they are stored, each read when it is asked for.

    The whole model is loaded only where the checkpoint has other names, or no plain floats: a
    quantized one holds codes, which are numbers of another scale.

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
        """Return a parameter, or a buffer of floats, by its path.

        Raises:
            LoraportError: If the base has none of this name, or it stays quantized when the model
                is loaded.
        """
        if self._checkpoint is not None:
            names = self._names.candidates(name)
            if len(names) == 1 and self._checkpoint.info(names[0]).dtype in _PLAIN:
                return self._checkpoint.load(names[0])
        from torch import Tensor
        from torch.nn import Parameter

        from loraport.base.stored_tensors import stored_tensor

        model, missing = self._model
        try:
            if name in missing:  # transformers drew it at random
                raise AttributeError(name)
            found = stored_tensor(model, name)
        except AttributeError as error:
            raise LoraportError(
                f"{name}: expected this parameter in the base {self.base}, got none; give --base "
                "with the model that the adapter was trained on"
            ) from error
        # Quantized ones are parameters of classes of their own, or float8.
        plain = type(found) in (Parameter, Tensor)
        if not plain or not found.is_floating_point() or found.itemsize < 2:
            raise LoraportError(
                f"{name}: expected its numbers in the base {self.base}, got the codes of a "
                f"quantization ({found.dtype}); give --base with the float model that it was made "
                "from"
            )
        return found.detach()

    @cached_property
    def _checkpoint(self) -> Checkpoint | None:
        if read_model_config(self._directory).get("quantization_config"):
            return None
        try:
            return Checkpoint(self._directory)
        except LoraportError:
            return None  # other files than safetensors, which transformers may read

    @cached_property
    def _names(self) -> NameIndex:
        return NameIndex(self._checkpoint or ())

    @cached_property
    def _model(self) -> tuple[nn.Module, tuple[str, ...]]:
        return load_model_as_it_is(self.base)
