"""``loraport run``."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from loraport.cli.options import log, strengths
from loraport.errors import LoraportError


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
) -> None:
    """Generate text with BUNDLE and any of its adapters, or several blended."""
    from loraport.runtime import Runtime, Sampling
    from loraport.runtime.text import TextGenerator

    selection = strengths(adapters)
    sampling = Sampling(max_new_tokens, temperature, top_p, seed)
    text = _read_stdin() if prompt == "-" else prompt
    runtime = Runtime(bundle, provider=provider)
    generator = TextGenerator(runtime)
    for piece in generator.stream(text, selection or None, sampling, chat=not raw):
        click.echo(piece, nl=False)
    click.echo()
    log.print(generator.last_speed, style="dim")


def _read_stdin() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise LoraportError(f"--prompt -: expected text on stdin, got: {error}") from error
