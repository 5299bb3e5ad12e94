"""Inputs that a module takes as ``**kwargs``, which torch exports only where they have names."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def named_arguments(module: nn.Module, inputs: Collection[str]) -> Iterator[None]:
    """Let the module's ``forward`` name the inputs for a while, where it does not by itself.

    Args:
        module: The module; it is as it was afterwards.
        inputs: Names of what it is called with.
    """
    forward = module.forward
    if set(inputs) <= set(inspect.signature(forward).parameters):
        yield
        return

    @functools.wraps(forward)
    def named(**given: object) -> object:
        return forward(**given)

    arguments = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in inputs]
    named.__signature__ = inspect.Signature(arguments)  # type: ignore[attr-defined]
    own = vars(module).get("forward")
    module.forward = named
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
