"""How many bytes of tensors live at once, told by when their storages go."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch leaves it untyped
    """Counts the storages that operations make while it is active, until each is freed.

    What existed before counts nothing, whatever is done with it, and a view counts nothing beside
    what it looks at. Memory that a kernel takes and gives back within one operation is not seen.
    Works on real and on fake tensors.

    Attributes:
        changes: By how many bytes there were more or fewer, one after the other.
        now: Bytes alive.
        peak: The most there were.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.changes: list[int] = []
        self.now = self.peak = 0
        self._seen: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, torch.Tensor):
                self._see(value.untyped_storage(), 0)  # from before, unless it is known
        result = func(*args, **kwargs)
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                self._see(storage, storage.nbytes())
        return result

    def _see(self, storage: torch.UntypedStorage, size: int) -> None:
        number = id(storage)
        known = self._seen.get(number)
        if known is not None and known() is storage:
            return

        def freed(reference: weakref.ref[torch.UntypedStorage]) -> None:
            self._change(-size)
            if self._seen.get(number) is reference:  # else another has its number by now
                del self._seen[number]

        self._seen[number] = weakref.ref(storage, freed)
        self._change(size)

    def _change(self, size: int) -> None:
        if size:
            self.changes.append(size)
            self.now += size
            self.peak = max(self.peak, self.now)
