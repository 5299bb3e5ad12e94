"""``--compile``: a model's repeated layers as `torch.compile` makes them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from loraport.errors import LoraportError, first_line
from loraport.training.distributed.sharded_base import repeated_blocks

# One for each kind of batch: rows end to end or padded, one row or several, with and without
# gradients; the layers share them.
_KINDS = 64


@contextlib.contextmanager
def compiled_layers(
    model: nn.Module, backend: str | Callable[..., Any] = "inductor"
) -> Iterator[None]:
    """Let the layers of a model run compiled, as one kind of layer for batches of any length.

    Layers, not the whole model: they are alike, so one is compiled for all, in a fraction of the
    time, and what is around them (the loss a chunk at a time, hooks) stays as it is. Within them
    LoRA is computed by plain operations, which the compiler fuses and differentiates.

    Args:
        model: With LoRA layers; afterwards it is as it was.
        backend: Of `torch.compile`.

    Raises:
        LoraportError: If the model has no repeated layers, or they cannot be compiled.
    """
    import torch._dynamo

    layers = repeated_blocks(model)
    if not layers:
        raise LoraportError(
            f"--compile: expected a model with repeated layers, got {type(model).__name__}; "
            "leave out --compile"
        )
    for layer in layers:
        layer.compile(dynamic=True, backend=backend)
    limit = max(_KINDS, torch._dynamo.config.recompile_limit)
    try:
        with torch._dynamo.config.patch(recompile_limit=limit):
            yield
    except torch._dynamo.exc.TorchDynamoException as error:
        first = first_line(error)
        raise LoraportError(
            f"--compile: {type(layers[0]).__name__} cannot be compiled here: {first}; "
            "leave out --compile"
        ) from error
    finally:
        for layer in layers:
            layer._compiled_call_impl = None
