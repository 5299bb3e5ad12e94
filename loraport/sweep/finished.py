"""A sweep whose result is there: continued, it is what it was."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loraport.base.loading import fingerprint_model
from loraport.errors import LoraportError
from loraport.peft_layout.read import read_peft
from loraport.sweep.output import IDENTITY_FILE, RESULTS_FILE
from loraport.sweep.result import Line, SweepResult
from loraport.sweep.trial import Trial
from loraport.training.base.frozen_base import load_base
from loraport.training.devices import choose_placement
from loraport.training.run.checkpoints import require_same_run


def finished_before(
    out: Path, base: str, identity: Mapping[str, Any], trials: Sequence[Trial]
) -> SweepResult:
    """Return what a finished sweep wrote; only the removal of what it kept may be missing.

    Args:
        out: Its directory.
        base: The base at hand.
        identity: What a continued sweep must share.
        trials: The candidates.

    Raises:
        LoraportError: If what is there is something else, or of other options, candidates or
            another base.
    """
    try:
        stored = dict(json.loads((out / IDENTITY_FILE).read_bytes()))
        document = dict(json.loads((out / RESULTS_FILE).read_bytes()))
        lines = tuple(Line(**line) for line in document["candidates"])
        result = SweepResult(**document | {"candidates": lines})
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        raise LoraportError(
            f"{out} already exists and is not a sweep's result as this version of loraport writes "
            "it; choose another output or pass --force"
        ) from None
    require_same_run(out, stored, identity)
    there, wanted = {line.name for line in lines}, {trial.name for trial in trials}
    if there != wanted:
        more = ", ".join(sorted(there ^ wanted))
        raise LoraportError(
            f"{out}: expected a result of the same candidates, got one that differs in {more}; "
            "choose another output or pass --force"
        )
    adapter = read_peft(out)
    if adapter.base_fingerprint is not None:
        model = load_base(base, choose_placement("cpu", "float32"), "cpu", "float32")
        here = fingerprint_model(model, list(adapter.modules))
        adapter.base_fingerprint.require_same_base(here, f"sweep {out}", "the base at hand")
    return result
