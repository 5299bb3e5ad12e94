"""What records a device's work, to be repeated without the host: CUDA graphs.

Source: CUDA programming guide, "CUDA Graphs"; PyTorch notes on CUDA semantics, "CUDA Graphs".
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import nn


class Recorder(Protocol):
    """Records what functions have a device do, on a stream of work of its own."""

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        """Return what repeats what a function has the device do, without the function."""
        ...

    def stream(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which all that is not recorded has to run, too."""
        ...

    def anew(self) -> Recorder:
        """Return another for the same stream, whose recordings share no memory with this one's."""
        ...

    def runs_ahead(self, run: Callable[[], None]) -> bool:
        """Run a function once, and tell whether the host never waited for the device."""
        ...

    def has_room(self) -> bool:
        """Tell whether the device has as much memory left as a pass has taken so far."""
        ...


def on_gpu(model: nn.Module) -> Recorder:
    """Return CUDA's recorder, for the GPU on which a model is."""
    return _OnGpu(next(model.parameters()).device)


class _OnGpu:
    """CUDA's recorder, with one pool of memory: two recordings are never under way at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def __call__(self, run: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        recording = torch.cuda.graph(
            graph,
            pool=self._pool,
            stream=self._stream,
            capture_error_mode="thread_local",  # autograd's own thread takes part
        )
        try:
            with torch.cuda.stream(self._stream), recording:  # leaves its stream where it fails
                run()
        except BaseException:
            # Its random numbers, too, would be asked for by a recording for ever.
            random = torch.cuda.default_generators[self._device.index]
            with contextlib.suppress(RuntimeError):  # the cause is what counts
                random.graphsafe_set_state(random.clone_state())
            raise
        return graph.replay

    @contextlib.contextmanager
    def stream(self) -> Iterator[None]:
        outside = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(outside)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            outside.wait_stream(self._stream)

    def anew(self) -> _OnGpu:
        # A pool of which every recording is gone cannot be recorded into any more.
        made = copy.copy(self)
        made._pool = torch.cuda.graph_pool_handle()
        return made

    def runs_ahead(self, run: Callable[[], None]) -> bool:
        before = torch.cuda.get_sync_debug_mode()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it does not see everything
                torch.cuda.set_sync_debug_mode("error")
            run()
        except RuntimeError as error:
            if "synchronizing" not in str(error):
                raise
            return False
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return True

    def has_room(self) -> bool:
        # All that was taken at once so far, less what lasts: as much as one pass, or more.
        taken = torch.cuda.max_memory_allocated(self._device)
        taken -= torch.cuda.memory_allocated(self._device)
        return bool(torch.cuda.mem_get_info(self._device)[0] > taken)
