"""Keep parameters and running statistics apart that happen to be equal in an export.

Exporters share one constant among equal ones and drop what is zero. So a fresh classifier's bias
would vanish, and norms that are all ones would become one, which no adapter could replace alone.
While torch exports, such vectors have random values; the graph gets the true ones afterwards.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager

import onnx_ir as ir
import torch
from torch import nn

from loraport.stored_tensors import stored_tensor, stored_tensors

_DTYPES = (torch.float16, torch.float32, torch.float64)


@contextmanager
def distinct_parameters(
    module: nn.Module, leave: Collection[str] = ()
) -> Iterator[dict[str, torch.Tensor]]:
    """Give vectors that are constant, or equal to others, values of their own for a while.

    Args:
        module: The module; it is as it was afterwards.
        leave: Those to leave as they are.

    Yields:
        The true values, by path.
    """
    true = {name: stored_tensor(module, name).data for name in _alike(module) if name not in leave}
    random = torch.Generator().manual_seed(0)
    try:
        for name, values in true.items():
            drawn = torch.rand(values.shape, generator=random, dtype=torch.float64) + 0.5
            stored_tensor(module, name).data = drawn.to(values)
        yield true
    finally:
        for name, values in true.items():
            stored_tensor(module, name).data = values


def put_back(model: ir.Model, true: Mapping[str, torch.Tensor]) -> set[str]:
    """Give the graph's constants their true values, in place.

    Args:
        model: What torch exported.
        true: The values, by parameter.

    Returns:
        Parameters that the graph does not hold by their names: they are unused, or folded into
        other constants. The export must be done again with those left as they are.
    """
    missing = set()
    for name, values in true.items():
        value = model.graph.initializers.get(name)
        if value is None:
            missing.add(name)
        else:
            value.const_value = ir.tensor(values.detach().cpu().numpy(), name=name)
    return missing


def _alike(module: nn.Module) -> list[str]:
    """Return the vectors that are constant or equal to others; shared ones are left out."""
    seen: dict[bytes, str] = {}
    found: dict[str, None] = {}
    shared: set[int] = set()
    for name, tensor in stored_tensors(module).items():
        unfit = tensor.dim() != 1 or tensor.dtype not in _DTYPES or tensor.numel() == 0
        if unfit or id(tensor) in shared:
            continue
        shared.add(id(tensor))
        values = tensor.detach().cpu()
        content = values.numpy().tobytes()
        if content in seen:
            found.update(dict.fromkeys((seen[content], name)))
        elif bool((values == values[0]).all()):
            found[name] = None
        seen.setdefault(content, name)
    return list(found)
