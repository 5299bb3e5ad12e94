"""What a merge is asked to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


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
        adapters = tuple((Path(path), strength) for path, strength in self.adapters)
        object.__setattr__(self, "base", str(self.base))
        object.__setattr__(self, "adapters", adapters)
        for name in ("output", "initial_adapter"):
            given = getattr(self, name)
            object.__setattr__(self, name, None if given is None else Path(given))
