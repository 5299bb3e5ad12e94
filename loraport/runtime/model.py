"""Run a bundle: one session, many adapters, several threads."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from loraport.bundle.base_values import BaseValues
from loraport.bundle.content_hash import ContentHash
from loraport.bundle.manifest import MODEL_FILE, Manifest, check_files, read_manifest
from loraport.errors import LoraportError
from loraport.option_checks import as_path, is_finite, shown
from loraport.runtime.lane import Lane
from loraport.runtime.resident import (
    ResidentAdapter,
    blend_packed,
    empty_slots,
    make_resident,
    read_packed,
)
from loraport.runtime.rows import Rows, stack_packed
from loraport.runtime.session import open_session

# One adapter by name, several with strengths, or the base.
Selection = str | Mapping[str, float] | None


class Runtime:
    """A bundle opened with ONNX Runtime.

    Adapters stay resident on the session's device, so choosing another is a dictionary look-up.
    Any number of threads may run different adapters at once: each thread has lanes of its own.

    Args:
        bundle: The bundle's directory.
        provider: ``"cpu"`` or ``"cuda"``.
        threads: Threads inside operators; ONNX Runtime's choice unless told.
        check: Compare every file with its sha256 first, and of adapters that are added later what
            is used of them with its xxh3-128.
        float32_activations: Let quantized kernels compute in full precision.
        cuda_graphs: On CUDA, capture a decoder's step of one token once for each adapter and
            repeat it: text comes several times as fast where the GPU waits for the host. Runs
            take turns then, and none may leave outputs on the device.
        graph: A graph over the bundle's data file, to be opened in place of its own.

    Raises:
        LoraportError: If the bundle is damaged, the provider is not to be had, or CUDA graphs are
            asked for and the graph has nodes that cannot be captured.
    """

    def __init__(
        self,
        bundle: Path | str,
        *,
        provider: str = "cpu",
        threads: int | None = None,
        check: bool = True,
        float32_activations: bool = False,
        cuda_graphs: bool = False,
        graph: bytes | None = None,
    ) -> None:
        self.directory = as_path("the bundle", bundle)
        self.manifest: Manifest = read_manifest(self.directory)
        if check:
            check_files(self.manifest, self.directory)
        self._check = check
        self._unread: dict[str, ContentHash] = {}  # by path, of adapters that were added since
        self.provider = provider
        self._empty = empty_slots(self.manifest.slots, provider)  # the session points at it
        self.session = open_session(
            self.directory / MODEL_FILE,
            provider=provider,
            threads=threads,
            float32_activations=float32_activations,
            defaults=self._empty,
            precision=self.manifest.precision,
            graph=graph,
            cuda_graphs=cuda_graphs,
        )
        self._packed: dict[str, Mapping[str, Any]] = {}
        self._resident: dict[tuple[tuple[str, float], ...], ResidentAdapter] = {}
        self._lock = threading.Lock()
        self._threads = threading.local()

    @property
    def adapters(self) -> list[str]:
        """Names of the bundle's adapters."""
        return list(self.manifest.adapters)

    def refresh(self) -> None:
        """Read the manifest again: adapters added since are known, replaced ones take effect.

        A new adapter's file is compared with its hash while it is first read. Before one in use
        gives way to another, that is compared at once.

        Raises:
            LoraportError: If the graph is another one, or a file that is new, replaces an adapter
                in use or belongs to no adapter, is damaged; everything is as before then.
        """
        known, manifest = self.manifest, read_manifest(self.directory)
        new = {path: sha for path, sha in manifest.files.items() if known.files.get(path) != sha}
        if MODEL_FILE in new:
            raise LoraportError(
                f"bundle {self.directory}: expected the graph that is open, got another; open the "
                "bundle again"
            )
        others = {entry.file for entry in manifest.adapters.values()}
        others |= {case.file for case in manifest.golden.values()}
        later = {
            entry.tensors for name, entry in manifest.adapters.items() if name not in self._packed
        }
        if self._check:
            now = {path: sha for path, sha in new.items() if path not in others | later}
            check_files(replace(manifest, files=now), self.directory)
        with self._lock:
            self.manifest = manifest
            if self._check:
                self._unread |= {path: manifest.quickest_hash(path) for path in new.keys() & later}
            for name, entry in known.adapters.items():
                if manifest.adapters.get(name) != entry or entry.tensors in new:
                    self._forget(name)

    def load(self, selection: Selection) -> ResidentAdapter | None:
        """Make a selection resident; ``None`` for the base.

        Raises:
            LoraportError: If an adapter is unknown or does not fit, or a strength is no
                finite number.
        """
        key = _key(selection)
        if not key:
            return None
        with self._lock:
            found = self._resident.get(key)
            if found is None:
                parts = [(self._read(name), strength) for name, strength in key]
                found = make_resident(self._blended(parts), self.provider)
                self._resident[key] = found
        return found

    def unload(self, selection: Selection) -> None:
        """Forget a selection; its memory goes when the last lane that uses it does."""
        key = _key(selection)
        with self._lock:
            self._resident.pop(key, None)
            for name, _ in key:
                self._packed.pop(name, None)
            self._drop_lanes()

    def _forget(self, name: str) -> None:
        """Forget an adapter and every blend it is part of."""
        self._packed.pop(name, None)
        for key in [key for key in self._resident if name in dict(key)]:
            del self._resident[key]
        self._drop_lanes()

    def _drop_lanes(self) -> None:
        """Let every thread make its lanes anew when it next runs."""
        self._threads = threading.local()

    def lane(self, selection: Selection = None) -> Lane:
        """Return a new lane for a selection, to be used by one thread at a time."""
        controls = self.manifest.slots.controls
        return Lane(self.session, self.load(selection), self.provider, controls)

    def rows(self, selections: Mapping[str, Selection] | Iterable[str]) -> Rows:
        """Make adapters resident side by side, for batches with another adapter in every row.

        Args:
            selections: Names of adapters, or name → selection where some rows blend several.

        Raises:
            LoraportError: If the bundle was exported without ``--per-row``, or an adapter is
                unknown.
        """
        if not isinstance(selections, Mapping):
            selections = {name: name for name in selections}
        table = self.manifest.slots
        with self._lock:
            lanes = [
                blend_packed([(self._read(name), s) for name, s in _key(selection)], table)
                for selection in selections.values()
            ]
        resident = make_resident(stack_packed(lanes, table), self.provider)
        lane = Lane(self.session, resident, self.provider, table.controls)
        return Rows(lane, list(selections))

    def run(
        self,
        inputs: Mapping[str, Any],
        adapter: Selection = None,
        outputs: Iterable[str] | None = None,
    ) -> dict[str, np.ndarray]:
        """Run the model once with a selection of adapters; safe from several threads.

        Args:
            inputs: Every input of the model by name, without the slots.
            adapter: A name, names with strengths, or ``None`` for the base.
            outputs: Name or names of the outputs wanted; all unless told.

        Raises:
            LoraportError: If the adapter or an output is unknown, or the inputs do not fit.
        """
        return self._lane_of_this_thread(adapter).run(inputs, outputs)

    def _lane_of_this_thread(self, selection: Selection) -> Lane:
        own = self._threads  # another thread may put a new one in its place meanwhile
        if not hasattr(own, "lanes"):
            own.lanes = {}
        lanes: dict[tuple[tuple[str, float], ...], Lane] = own.lanes
        key = _key(selection)
        if key not in lanes:
            lanes[key] = self.lane(selection)
        return lanes[key]

    def _blended(self, parts: list[tuple[Mapping[str, Any], float]]) -> dict[str, Any]:
        return blend_packed(parts, self.manifest.slots, BaseValues(self.directory))

    def _read(self, name: str) -> Mapping[str, Any]:
        if name not in self._packed:
            path = self.manifest.require_adapter(name).tensors
            expected = self._unread.get(path)
            self._packed[name] = read_packed(self.directory / path, self.manifest.slots, expected)
            self._unread.pop(path, None)
        return self._packed[name]


def _key(selection: Selection) -> tuple[tuple[str, float], ...]:
    """Return a selection as pairs of name and strength; empty for the base."""
    if selection is None:
        return ()
    if isinstance(selection, str):
        return ((selection, 1.0),)
    if not isinstance(selection, Mapping):
        raise LoraportError(
            f"adapters: expected a name, names with strengths or None, got {selection!r}"
        )
    for name, strength in selection.items():
        if not is_finite(strength):
            got = shown(strength)
            raise LoraportError(f"strength of {name!r}: expected a finite number, got {got}")
    return tuple((name, float(strength)) for name, strength in selection.items())


def require_runtime(given: Runtime) -> Runtime:
    """Return a runtime, and refuse what is none, such as the path of a bundle.

    Raises:
        LoraportError: If it is none.
    """
    if not isinstance(given, Runtime):
        raise LoraportError(f"runtime: expected a Runtime, got {given!r}; open one with Runtime()")
    return given
