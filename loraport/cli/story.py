"""The chapters of ``loraport demo``."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path

import click
from rich.table import Table

import loraport
from loraport.cli.options import log, progress
from loraport.cli.reports import print_verification, table_console
from loraport.counts import counted
from loraport.errors import LoraportError
from loraport.output import refuse_existing

TASKS = ("tickets", "captain")
DEMO_PROMPTS = (
    "Your rider took my pizza to Mill Road instead of Mill Lane and it arrived stone cold.",
    "How do I check if a number is even?",
)
_SELECTIONS: tuple[tuple[str, dict[str, float]], ...] = (
    ("base", {}),
    ("tickets", {"tickets": 1.0}),
    ("captain", {"captain": 1.0}),
    ("tickets ×0.4 + captain ×0.8", {"tickets": 0.4, "captain": 0.8}),
    ("base again", {}),
)
_RANK = 8
_LEARNING_RATE = 2e-3
_SAVE_EVERY = 20
_NEW_TOKENS = 48
_TIMED_SWAPS = 50


def sample_data() -> Path:
    """Return the directory of the sample data sets, installed or in a checkout.

    Raises:
        LoraportError: If neither is there.
    """
    package = Path(loraport.__file__).parent
    for directory in (package / "sample_data", package.parent / "samples" / "data"):
        if (directory / f"{TASKS[0]}.jsonl").is_file():
            return directory
    raise LoraportError("sample data: expected it in the package, got none; install loraport again")


class Story:
    """One run of the demo; each method is a chapter.

    Args:
        base: The model to adapt.
        output: Directory for everything the demo makes.
        steps: Optimizer steps per adapter.
        force: Replace an earlier demo.

    Raises:
        LoraportError: If ``output`` holds an earlier demo and ``force`` is false.
    """

    def __init__(self, base: str, output: Path, *, steps: int, force: bool) -> None:
        self._base = base
        self._output = output
        self._steps = steps
        self._force = force
        self._bundle = output / "bundle"
        for name in (*TASKS, "bundle"):
            refuse_existing(output / name, force=force, inputs=(base,))

    def train(self) -> None:
        """Train one adapter per task and show what it gained on held-out rows."""
        from loraport.training import LoopOptions, LoraOptions, TrainOptions, train_language_model
        from loraport.training.report import ProgressReport

        _chapter(f"Train two adapters on {self._base}")
        table = Table()
        for heading in ("adapter", "trainable", "size", "base loss", "adapted loss"):
            table.add_column(heading, justify="left" if heading == "adapter" else "right")
        options = TrainOptions(
            lora=LoraOptions(rank=_RANK),
            loop=LoopOptions(
                learning_rate=_LEARNING_RATE, steps=self._steps, save_every=_SAVE_EVERY
            ),
        )
        for task in TASKS:
            progress(f"{task}: {counted(self._steps, 'step')}, rank {_RANK}")
            summary = train_language_model(
                self._base,
                sample_data() / f"{task}.jsonl",
                self._output / task,
                options,
                validation=sample_data() / f"{task}.heldout.jsonl",
                force=self._force,
                observer=ProgressReport(log),
            )
            table.add_row(
                task,
                f"{100 * summary.trainable_share:.2f} %",
                f"{summary.adapter_bytes / 1e6:.1f} MB",
                f"{summary.base_validation_loss or float('nan'):.3f}",
                f"{summary.validation_loss or float('nan'):.3f}",
            )
        click.echo("Loss on held-out rows, per answer token:")
        table_console().print(table)

    def export(self) -> None:
        """Export the base once; the graph knows nothing of the adapters."""
        from converters.formats.registry import read_adapter
        from converters.onnx import add_adapters, export_base
        from loraport.bundle.sources import record_adapter

        _chapter("Export the base once to ONNX, then add the adapters")
        adapters = {task: read_adapter(self._output / task) for task in TASKS}

        def finish(bundle: Path) -> None:
            add_adapters(bundle, adapters, progress=progress)
            for task in TASKS:
                record_adapter(bundle, task, str((self._output / task).resolve()))

        export_base(self._base, self._bundle, force=self._force, progress=progress, finish=finish)
        click.echo(f"{self._bundle} holds the model and {counted(len(adapters), 'adapter')}")

    def swap(self) -> None:
        """Run the same model as base, with each adapter, blended, and as base again."""
        from loraport.runtime import Runtime, Sampling, TextGenerator

        _chapter("One model in memory, swapped between adapters")
        generator = TextGenerator(Runtime(self._bundle))
        for prompt in DEMO_PROMPTS:
            click.secho(f"\n> {prompt}", bold=True)
            texts = {}
            for title, selection in _SELECTIONS:
                sampling = Sampling(max_new_tokens=_NEW_TOKENS)
                texts[title] = generator.generate(prompt, selection or None, sampling)
                click.echo(f"{title:>28}: {' '.join(texts[title].split())}")
            if texts["base"] != texts["base again"]:
                raise RuntimeError("the base's text changed after the swaps")

    def verify(self) -> None:
        """Prove that the bundle computes what PyTorch computes."""
        from converters.formats.registry import read_adapter
        from loraport.base.loading import load_model
        from loraport.parity import verify_bundle

        _chapter("Proof: ONNX Runtime = PyTorch")
        adapters = {task: read_adapter(self._output / task) for task in TASKS}
        report = verify_bundle(self._bundle, load_model(self._base), adapters, progress=progress)
        print_verification(report)
        if not report.passed:
            click.secho("parity fails", fg="red", err=True)
            sys.exit(1)

    def time_swaps(self) -> None:
        """Time a swap against opening a session anew, in the same process."""
        from loraport.runtime import Runtime

        _chapter("A swap against a session reload")
        runtime = Runtime(self._bundle, check=False)
        for task in TASKS:
            runtime.lane(task)
        swaps = []
        for index in range(_TIMED_SWAPS):
            start = time.perf_counter()
            runtime.lane(TASKS[index % 2])
            swaps.append(time.perf_counter() - start)
        reloads = []
        for _ in range(3):
            start = time.perf_counter()
            Runtime(self._bundle, check=False)
            reloads.append(time.perf_counter() - start)
        swap, reload = statistics.median(swaps), statistics.median(reloads)
        click.echo(
            f"swap {1e3 * swap:.2f} ms, session reload {1e3 * reload:.0f} ms: "
            f"{reload / swap:.0f} × faster (medians of {len(swaps)} and {len(reloads)})"
        )


def _chapter(title: str) -> None:
    click.secho(f"\n== {title}", fg="cyan", bold=True)
