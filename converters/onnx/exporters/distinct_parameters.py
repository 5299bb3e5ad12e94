"""Keep parameters and running statistics apart that happen to be equal in an export.

Exporters share one constant among equal ones, compute equal layers of one input once, and drop what
is zero. So a fresh classifier's bias would vanish, norms that are all ones would become one, which
no adapter could replace alone, and an adapter for a layer would act in its copy, too. While torch
exports, such parameters have random values; the graph gets the true ones afterwards.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from loraport.base.stored_tensors import stored_tensor, stored_tensors

_DTYPES = (torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True, eq=False)
class Distinct:
    """A parameter that has other values for a while.

    Attributes:
        true: The values that are its own.
        drawn: Those that it has meanwhile.
    """

    true: torch.Tensor
    drawn: torch.Tensor


@contextmanager
def distinct_parameters(
    module: nn.Module, leave: Collection[str] = ()
) -> Iterator[dict[str, Distinct]]:
    """Give vectors that are constant, and what is equal to others, other values for a while.

    Args:
        module: The module; it is as it was afterwards.
        leave: Those to leave as they are.

    Yields:
        The values, by path.
    """
    random = torch.Generator().manual_seed(0)
    changed: dict[str, Distinct] = {}
    for name in _alike(module):
        if name not in leave:
            true = stored_tensor(module, name).data
            drawn = torch.rand(true.shape, generator=random, dtype=torch.float64) + 0.5
            changed[name] = Distinct(true, drawn.to(true))
    try:
        for name, values in changed.items():
            stored_tensor(module, name).data = values.drawn
        yield changed
    finally:
        for name, values in changed.items():
            stored_tensor(module, name).data = values.true


def put_back(model: ir.Model, changed: Mapping[str, Distinct]) -> set[str]:
    """Give the graph's constants their true values, in place.

    Args:
        model: What torch exported.
        changed: The values, by parameter.

    Returns:
        Parameters that the graph does not hold, by their names or transposed: they are unused, or
        folded into other constants. The export must be done again with those left as they are.
    """
    missing = set()
    for name, values in changed.items():
        found = [(value, values.true) for value in (model.graph.initializers.get(name),) if value]
        if values.true.dim() == 2:
            found += [(value, values.true.T) for value in _holding(model.graph, values.drawn.T)]
        for value, true in found:
            value.const_value = ir.tensor(true.detach().cpu().numpy(), name=value.name)
        if not found:
            missing.add(name)
    return missing


def _holding(graph: ir.Graph, wanted: torch.Tensor) -> list[ir.Value]:
    """Return the constants that have these values."""
    values = wanted.detach().cpu().numpy()
    return [
        value
        for value in graph.initializers.values()
        if (stored := value.const_value) is not None
        and tuple(stored.shape.numpy()) == values.shape
        and np.array_equal(stored.numpy(), values)
    ]


def _alike(module: nn.Module) -> list[str]:
    """Return vectors that are constant and what is equal to others.

    Matrices that several modules share are left out: each may have them folded in its own way.
    """
    stored = stored_tensors(module)
    names = Counter(map(id, stored.values()))
    seen: dict[bytes, str] = {}
    found: dict[str, None] = {}
    shared: set[int] = set()
    for name, tensor in stored.items():
        if tensor.dim() == 0 or tensor.dtype not in _DTYPES or tensor.numel() == 0:
            continue
        if tensor.dim() > 1 and (names[id(tensor)] > 1 or not isinstance(tensor, nn.Parameter)):
            continue
        if id(tensor) in shared:
            continue
        shared.add(id(tensor))
        values = tensor.detach().cpu().contiguous()
        kind = repr((values.shape, values.dtype)).encode()
        content = kind + sha256(values.numpy().view(np.uint8).data).digest()
        if content in seen:
            found.update(dict.fromkeys((seen[content], name)))
        elif values.dim() == 1 and bool((values == values[0]).all()):
            found[name] = None
        seen.setdefault(content, name)
    return list(found)
