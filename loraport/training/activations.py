"""How many bytes autograd keeps of a forward pass, counted on tensors that hold no numbers."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from loraport.errors import LoraportError
from loraport.training.frozen_base import checkpoint_activations
from loraport.training.inject import attach
from loraport.training.options import LoraOptions

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Activations:
    """What is kept between the forward and the backward pass of one batch.

    Attributes:
        kept: Bytes of all tensors kept, each storage once.
        largest: Bytes of the largest.
    """

    kept: int
    largest: int


def activations(
    model: PreTrainedModel,
    options: LoraOptions,
    dtype: torch.dtype,
    shape: tuple[int, int],
    *,
    checkpointed: int | None,
) -> Activations:
    """Count what a forward pass through the layers keeps; the output head is not in it.

    The pass is traced with fake tensors: nothing is computed and nothing allocated. Attention has
    a mask, as with rows of unlike length; without one it keeps a little less.

    Args:
        model: The base on the meta device, without LoRA layers; left as it is.
        options: What is adapted.
        dtype: bfloat16 for autocast, float32 for none.
        shape: Rows and tokens per row.
        checkpointed: How many layers, the first ones, keep their inputs alone and compute the rest
            again; ``None`` for all.

    Raises:
        LoraportError: If the model does not support checkpointing, or cannot be traced.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    model = copy.deepcopy(model)  # of shapes alone
    attach(model, options)
    model.train()
    kept: dict[int, int] = {}
    rounded = (
        torch.autocast("cpu", dtype=dtype) if dtype is torch.bfloat16 else contextlib.nullcontext()
    )
    try:
        if checkpointed != 0:
            checkpoint_activations(model, checkpointed)
        with FakeTensorMode(allow_non_fake_inputs=True):
            model.to_empty(device="cpu")
            own = {parameter.untyped_storage()._cdata for parameter in model.parameters()}

            def keep(tensor: torch.Tensor) -> torch.Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    kept[storage._cdata] = storage.nbytes()
                return tensor

            tokens = torch.zeros(shape, dtype=torch.int64, device="cpu")
            hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
            with hooks, rounded:
                # What it returns must live until all is counted: storages are told by address.
                result = model.base_model(input_ids=tokens, use_cache=False)
            del result
    except LoraportError:
        raise
    except Exception as error:
        raise LoraportError(
            f"--dry-run: {type(model).__name__} cannot be traced without its weights "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
            "train a few steps instead (--steps 2)"
        ) from error
    return Activations(sum(kept.values()), max(kept.values(), default=0))
