"""``loraport run``."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraport.cli.options import log, strengths
from loraport.errors import LoraportError

if TYPE_CHECKING:
    from loraport.runtime import Runtime


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--adapter", "adapters", multiple=True, metavar="NAME[=STRENGTH]", help="None for the base."
)
@click.option("--prompt", required=True, help="What the user says; '-' reads it from stdin.")
@click.option("--raw", is_flag=True, help="Continue the text as it is, without a chat template.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=128, show_default=True)
@click.option("--temperature", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option("--top-p", type=click.FloatRange(0, 1, min_open=True), default=1.0, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option(
    "--cuda-graphs/--no-cuda-graphs",
    default=None,
    help="With --provider cuda, capture the step of one token and repeat it. Where nothing is "
    "said: where that can be done.",
)
def run(
    bundle: Path,
    adapters: tuple[str, ...],
    prompt: str,
    raw: bool,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
    provider: str,
    cuda_graphs: bool | None,
) -> None:
    """Generate text with BUNDLE and any of its adapters, or several blended."""
    from loraport.runtime import Sampling
    from loraport.runtime.text import TextGenerator

    selection = strengths(adapters)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    text = _read_stdin() if prompt == "-" else prompt
    generator = TextGenerator(_open(bundle, provider, cuda_graphs))
    for piece in generator.stream(text, selection or None, sampling, chat=not raw):
        click.echo(piece, nl=False)
    click.echo()
    log.print(generator.last_speed, style="dim")


def _open(bundle: Path, provider: str, cuda_graphs: bool | None) -> Runtime:
    from loraport.runtime import Runtime

    if cuda_graphs is None and provider == "cuda":
        with contextlib.suppress(LoraportError):  # what else is wrong is told below
            return Runtime(bundle, provider=provider, cuda_graphs=True)
    return Runtime(bundle, provider=provider, cuda_graphs=bool(cuda_graphs))


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise LoraportError(f"--prompt -: expected text on stdin, got: {error}") from error
