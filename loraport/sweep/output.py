"""The directory that holds what came of a sweep: adapter, table, plot."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraport.output import new_directory
from loraport.peft_layout.write import peft_contents, save_contents
from loraport.sweep.plot import draw_quality

if TYPE_CHECKING:
    from loraport.sweep.result import SweepResult
    from loraport.sweep.worker import Trained

IDENTITY_FILE = "sweep.json"
RESULTS_FILE, TABLE_FILE, PLOT_FILES = "results.json", "results.csv", ("quality.png", "quality.svg")


def write_result(
    out: Path,
    trained: Sequence[Trained],
    result: SweepResult,
    identity: Mapping[str, Any],
    *,
    keep_all: bool,
    force: bool,
) -> None:
    """Write the directory of a sweep, which appears whole.

    Args:
        out: The directory.
        trained: All candidates.
        result: What came of them.
        identity: What a sweep that is continued must share.
        keep_all: Keep the adapters of all, not only of the one taken.
        force: Replace ``out``.
    """
    with new_directory(out, force=force) as partial:
        for each in trained:
            if each.adapter is None:
                continue
            contents = peft_contents(each.adapter)
            if each.trial.name == result.taken:
                save_contents(partial, each.adapter, *contents)
            if keep_all:
                directory = partial / "candidates" / each.trial.name
                directory.mkdir(parents=True)
                save_contents(directory, each.adapter, *contents)
        (partial / RESULTS_FILE).write_text(json.dumps(asdict(result), indent=2) + "\n")
        (partial / IDENTITY_FILE).write_text(json.dumps(identity, indent=2) + "\n")
        lines: list[Mapping[str, Any]] = [asdict(line) for line in result.candidates]
        with (partial / TABLE_FILE).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)
        for name in PLOT_FILES:
            draw_quality(result, partial / name)
