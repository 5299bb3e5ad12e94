"""What a merge is asked to do."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loraport.errors import Problems
from loraport.option_checks import (
    check_count,
    check_path,
    check_switches,
    is_finite,
    is_path,
    shown,
)


@dataclass(frozen=True)
class MergeOptions:
    """Options of one merge; paths may be given as texts, and the base as a path.

    Attributes:
        base: The base model: directory, ``.safetensors`` or ``.gguf`` file, hub name.
        adapters: Adapter paths and their strengths.
        output: The new directory; ``None`` only plans.
        force: Replace an existing output.
        ignore_fingerprint: Merge into a base other than the one an adapter was trained on.
        initial_adapter: The adapter as it was before training, for initialisations that
            change the base (PiSSA, OLoRA, CorDA).
        threads: Threads that work at once; ``None`` for as many as there are cores.
    """

    base: str
    adapters: tuple[tuple[Path, float], ...]
    output: Path | None = None
    force: bool = False
    ignore_fingerprint: bool = False
    initial_adapter: Path | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        problems = Problems()
        adapters = []
        given: Any = self.adapters
        for each in given if isinstance(given, Iterable) else [given]:
            if not isinstance(each, tuple | list) or len(each) != 2:
                problems.add("adapters", "a path and a strength of each", repr(each))
                continue
            path, strength = each
            if not is_path(path):
                problems.add("adapters", "a path and a strength of each", repr(each))
                continue
            if not is_finite(strength):
                problems.add(f"strength of {path}", "a finite number", shown(strength))
            adapters.append((Path(path), strength))
        check_path(problems, "base", self.base)
        for name in ("output", "initial_adapter"):
            if getattr(self, name) is not None:
                check_path(problems, name, getattr(self, name))
        check_switches(problems, self, "force", "ignore_fingerprint")
        if self.threads is not None:
            check_count(problems, "threads", self.threads, 1)
        problems.raise_if_any("merge options cannot be used")
        object.__setattr__(self, "base", str(self.base))
        object.__setattr__(self, "adapters", tuple(adapters))
        for name in ("output", "initial_adapter"):
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else Path(given))
