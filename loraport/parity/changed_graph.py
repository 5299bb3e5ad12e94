"""A bundle's graph run otherwise than it is stored, over the same data and slots."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraport.bundle.manifest import MODEL_FILE
from loraport.runtime import Lane, Runtime, Selection
from loraport.runtime.session import open_session

if TYPE_CHECKING:
    import numpy as np


class ChangedGraph:
    """Runs a bundle's graph with a change; nothing is opened before that.

    Args:
        runtime: The bundle.
        change: Gives the graph of a file serialized, or ``None`` if there is nothing to change.
    """

    def __init__(self, runtime: Runtime, change: Callable[[Path], bytes | None]) -> None:
        self._runtime = runtime
        self._change = change
        self._file = runtime.directory / MODEL_FILE

    @property
    def changes(self) -> bool:
        """Whether there is anything to change."""
        return self._session is not None

    def run(
        self, inputs: Mapping[str, np.ndarray], selection: Selection, outputs: Sequence[str]
    ) -> list[np.ndarray]:
        """Run the graph, where it `changes`; return the outputs in order."""
        runtime = self._runtime
        controls = runtime.manifest.slots.controls
        lane = Lane(self._session, runtime.load(selection), runtime.provider, controls)
        found = lane.run(inputs, outputs)
        return [found[name] for name in outputs]

    @cached_property
    def _session(self) -> Any:
        graph = self._change(self._file)
        if graph is None:
            return None
        precision = self._runtime.manifest.precision
        return open_session(
            self._file, graph=graph, provider=self._runtime.provider, precision=precision
        )
