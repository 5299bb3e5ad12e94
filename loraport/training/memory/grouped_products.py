"""Products of experts on tensors without numbers, in every dtype that real ones take."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class GroupedProducts(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Gives rows times experts ``[rows, in] x [experts, in, out]`` their shape.

    torch multiplies float32, too, but its rule for tensors without numbers knows bfloat16 alone.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._grouped_mm.default:
            rows, experts = args[:2]
            if rows.dtype is not torch.bfloat16 and (rows.dim(), experts.dim()) == (2, 3):
                return rows.new_empty(rows.shape[0], experts.shape[2])
        return func(*args, **kwargs or {})
