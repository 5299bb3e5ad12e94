"""The command line, the only place that knows both the core and the converters.

Each command is one file in this package and is imported only when it runs, so
``loraport --help`` stays fast and imports no heavy library.
"""

from __future__ import annotations

import importlib
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from loraport import __version__
from loraport.cli.asked_to_end import interrupted_by_signals
from loraport.cli.first_process import leave_to_the_first
from loraport.cli.visible import visible
from loraport.errors import LoraportError

# Command → the line that `loraport --help` shows. The function of the same name lives in the
# module of the same name ("bundle" in loraport/cli/bundle.py).
COMMANDS = {
    "demo": "The whole story on a real model: train, export, swap, verify.",
    "train": "Train a LoRA adapter on JSONL data.",
    "sweep": "Try ranks, targets, alphas and learning rates, and say which to take.",
    "eval": "Score a base and adapters on data: loss, accuracy, exact match, forgetting.",
    "convert": "Write an adapter as PEFT, MLX, GGUF, kohya, diffusers or .onnx_adapter.",
    "merge": "Merge adapters into a base of any size: streamed, exact, one pass.",
    "extract": "Turn a full fine-tune into an adapter.",
    "compose": "Write a weighted sum of adapters as one adapter.",
    "inspect": "Say what an adapter, checkpoint, .onnx or bundle is.",
    "export": "Export a model once to ONNX with slots for adapters.",
    "add": "Pack one more adapter into a bundle; no re-export.",
    "verify": "Prove that a bundle computes what PyTorch computes.",
    "run": "Run a bundle with any of its adapters, or several blended.",
    "bundle": "Check a bundle, pack it for shipping, ship only what changed.",
}
_BROKEN_PIPE = 128 + 13  # SIGPIPE, which Windows has no name for


@contextmanager
def _nobody_reads() -> Iterator[None]:
    """Where nobody reads what is printed, end as a shell reports SIGPIPE.

    click and rich end it with 1, which is what parity that fails ends with.
    """
    try:
        yield
        return
    except BrokenPipeError:
        pass
    except SystemExit as stop:
        if not isinstance(stop.__context__, BrokenPipeError):
            raise
    # What is left in the streams would break when Python closes them.
    with open(os.devnull, "w") as nowhere:
        for stream in filter(None, (sys.stdout, sys.stderr)):
            try:
                stream.flush()
            except OSError:
                os.dup2(nowhere.fileno(), stream.fileno())
    raise click.exceptions.Exit(_BROKEN_PIPE)


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        """Return the command names in the order of the story they tell."""
        return list(COMMANDS)

    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the arguments; the group's own help is printed here, see `_nobody_reads`."""
        with _nobody_reads():
            return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> object:
        """Run a command, see `_nobody_reads`."""
        with _nobody_reads():
            return super().invoke(ctx)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:  # noqa: ARG002
        """Import one command."""
        if name not in COMMANDS:
            return None
        module = importlib.import_module(f"loraport.cli.{name}")
        command: click.Command = getattr(module, name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without importing them."""
        del ctx
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="loraport")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Take a LoRA adapter from the GPU it was trained on to every place a model runs."""
    leave_to_the_first(ctx.invoked_subcommand)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 parity fails, 2 wrong usage or bad input."""
    # Before torch is imported: its threads then sleep while they wait for each other. By default
    # they spin, and where another process wants a core too, a step takes many times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    for stream in (sys.stdout, sys.stderr):
        # What an encoding has no character for is written as \xd7, as Python does on stderr.
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors="backslashreplace")
    try:
        with interrupted_by_signals():
            code = cli.main(args=arguments, prog_name="loraport", standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except LoraportError as error:
        click.secho(f"error: {visible(str(error))}", fg="red", err=True)
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt) as stop:
        cause = stop.__cause__ or stop  # click wraps what interrupts
        click.echo(str(cause) or "interrupted", err=True)
        # As a shell reports a process that a signal ended; SIGINT unless it is told.
        sys.exit(128 + getattr(cause, "signal_number", 2))
    except OSError as error:
        # A full disk, a missing permission: the user's to mend, not a bug of ours.
        click.secho(f"error: {visible(str(error))}", fg="red", err=True)
        sys.exit(2)
    sys.exit(code if isinstance(code, int) else 0)
