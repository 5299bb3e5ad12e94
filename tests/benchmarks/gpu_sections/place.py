"""What the sections share: a line of the table, bundles and adapters, medians."""

import shutil
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from converters.onnx import ExportOptions, add_adapters, export_base, exporting
from converters.onnx.exporters.genai_builder import build_with_genai
from converters.onnx.slots.inserting import SlotOptions
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.base.finding import resolve_base
from loraport.bundle.manifest import Manifest, read_manifest

RANK, ROWS, PROMPT = 16, 8, 64


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    figure: str
    note: str = ""


@dataclass(frozen=True)
class Place:
    """Where and on what everything is measured.

    Attributes:
        base: What is exported.
        device: ``cuda``, or ``cpu`` to try the script.
        scratch: A directory of its own.
        steps: Repetitions of each timing.
        precisions: Those of the bundles.
        tiny: Train tiny models for a few steps, to try the script.
    """

    base: str
    device: str
    scratch: Path
    steps: int
    precisions: tuple[str, ...]
    tiny: bool = False

    def bundle(self, precision: str, *, per_row: bool = False) -> Path:
        """Return a bundle with adapters ``a0`` ... ``a7``, exported when first asked for."""
        out = self.scratch / f"{precision}{'-rows' if per_row else ''}"
        if not out.exists():
            slots = SlotOptions(per_row=per_row)
            options = ExportOptions(provider=self.device, precision=precision, slots=slots)
            with mock.patch.object(exporting, "build_with_genai", self._built_once):
                export_base(self.base, out, options)
            add_adapters(out, adapters(read_manifest(out), ROWS if per_row else 2))
        return out

    def plain(self, precision: str) -> Path | None:
        """Return the builder's own graph without slots, where it makes one of the precision."""
        if precision not in ("fp32", "fp16", "bf16", "int4"):
            return None
        return self._graph(resolve_base(self.base), precision, self.device)

    def _built_once(self, base: Path, out: Path, *, precision: str, provider: str) -> None:
        """Copy what the builder makes: it takes longer than all else of an export."""
        shutil.copytree(self._graph(base, precision, provider), out, dirs_exist_ok=True)

    def _graph(self, base: Path, precision: str, provider: str) -> Path:
        made = self.scratch / f"{precision}-plain"
        if not made.exists():
            made.mkdir()
            build_with_genai(base, made, precision=precision, provider=provider)
        return made


def adapters(manifest: Manifest, count: int) -> dict[str, Adapter]:
    """Return random adapters of rank 16 on every linear module that has a slot."""
    made = {}
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        modules = {}
        for path, (slot, member) in manifest.slots.modules().items():
            a = torch.randn(RANK, slot.in_features, generator=generator) / slot.in_features**0.5
            b = torch.randn(member.stop - member.start, RANK, generator=generator) * 0.02
            modules[path] = LoraModule(ModuleKind.LINEAR, a, b, alpha=RANK)
        made[f"a{number}"] = Adapter(modules)
    return made


def medians(count: int, *actions: Callable[[], Any], warm: int = 5) -> list[float]:
    """Return the median seconds of actions, run in turns; each ends with a result on the host."""
    for _ in range(warm):
        for action in actions:
            action()
    found: list[list[float]] = [[] for _ in actions]
    for _ in range(count):
        for times, action in zip(found, actions, strict=True):
            start = time.perf_counter()
            action()
            times.append(time.perf_counter() - start)
    return [statistics.median(times) for times in found]
