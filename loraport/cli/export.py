"""``loraport export``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraport.cli.options import log, named_paths, progress
from loraport.counts import counted

if TYPE_CHECKING:
    import numpy as np


@click.command()
@click.argument("base")
@click.option("-o", "--output", required=True, type=click.Path(path_type=Path), help="The bundle.")
@click.option("--adapter", "adapters", multiple=True, metavar="NAME=ADAPTER", help="Add at once.")
@click.option(
    "--precision",
    type=click.Choice(["fp32", "fp16", "bf16", "int8", "int4"]),
    default="fp32",
    show_default="fp32; a MODEL.onnx's own",
    help="Of the base's weights; adapters stay in floating point.",
)
@click.option(
    "--provider",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="What the graph is made for.",
)
@click.option(
    "--slots",
    default="lora",
    show_default=True,
    metavar="LIST",
    help="What adapters may have: of lora (linear layers), embedding, conv, the modules; gain "
    "(DoRA) and bias (LoRA bias) on all of them.",
)
@click.option(
    "--replace",
    "replaced",
    multiple=True,
    metavar="LIST",
    help="Modules and parameters that adapters may store as a whole (modules_to_save, trained "
    "biases): classifier,norm,bias",
)
@click.option("--strength-input", is_flag=True, help="An input that scales the adapter per run.")
@click.option("--per-row", is_flag=True, help="Every row of a batch can have its own adapter.")
@click.option("--lm-head", is_flag=True, help="Put a slot beside the output head too.")
@click.option("--base", "checkpoint", help="What MODEL.onnx was exported from, if that is known.")
@click.option(
    "--input",
    "inputs",
    multiple=True,
    metavar="NAME=FILE.npy",
    help="Golden inputs for MODEL.onnx; made from its shapes unless given.",
)
@click.option("--copy-data", is_flag=True, help="Copy MODEL.onnx's data files: no links to them.")
@click.option("--force", is_flag=True, help="Replace an existing bundle.")
def export(
    base: str,
    output: Path,
    adapters: tuple[str, ...],
    precision: str,
    provider: str,
    slots: str,
    replaced: tuple[str, ...],
    strength_input: bool,
    per_row: bool,
    lm_head: bool,
    checkpoint: str | None,
    inputs: tuple[str, ...],
    copy_data: bool,
    force: bool,
) -> None:
    """Export BASE once to ONNX, with slots that any LoRA adapter of it fits.

    BASE is a model directory, a .gguf file, a hub name (owner/name), 'smollm2', or a MODEL.onnx
    that is already exported, by whatever tool.
    """
    from converters.formats.registry import read_adapter
    from converters.onnx.exporting import ExportOptions, export_base
    from converters.onnx.packing.adding import add_adapters
    from converters.onnx.slots.inserting import SlotOptions
    from loraport.bundle.manifest import read_manifest
    from loraport.bundle.sources import record_adapter
    from loraport.output import refuse_existing

    paths = named_paths(adapters, "--adapter")
    golden = named_paths(inputs, "--input")
    read_paths = (base, checkpoint, *paths.values(), *golden.values())
    refuse_existing(output, force=force, inputs=read_paths)
    read = {name: read_adapter(path) for name, path in paths.items()}

    def finish(bundle: Path) -> None:
        if read:
            add_adapters(bundle, read, progress=progress)
        for name, path in paths.items():
            record_adapter(bundle, name, str(path.resolve()))

    variants = _listed(slots)
    options = ExportOptions(
        precision=precision,
        provider=provider,
        lm_head=lm_head,
        slots=SlotOptions(variants, strength_input, per_row, _listed(*replaced)),
    )
    if base.lower().endswith(".onnx"):
        from converters.onnx.importing import ImportOptions, import_model

        arrays = _arrays(golden)
        own = ImportOptions(checkpoint, options.slots, lm_head, arrays, precision, copy_data)
        import_model(Path(base), output, own, force=force, progress=progress, finish=finish)
    elif checkpoint is not None or inputs or copy_data:
        raise click.UsageError(
            "--base, --input and --copy-data are for a MODEL.onnx that is already exported"
        )
    else:
        export_base(base, output, options, force=force, progress=progress, finish=finish)
    manifest = read_manifest(output)
    if base.lower().endswith(".onnx"):
        for name, reason in manifest.unslotted.items():
            log.print(f"no slot: {name}: {reason}")
    log.print(
        f"{output}: {counted(len(manifest.slots.slots), 'slot')} for "
        f"{counted(len(manifest.slots.modules()), 'module')}, "
        f"{counted(len(manifest.adapters), 'adapter')}"
    )


def _listed(*values: str) -> tuple[str, ...]:
    """Read names that are separated by commas, each once."""
    return tuple(dict.fromkeys(part.strip() for value in values for part in value.split(",")))


def _arrays(paths: Mapping[str, Path]) -> dict[str, np.ndarray]:
    """Read ``NAME=FILE.npy`` options."""
    import numpy

    from loraport.errors import LoraportError

    found = {}
    for name, path in paths.items():
        try:
            found[name] = numpy.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise LoraportError(f"--input {name}: {path}: expected a .npy file: {error}") from error
    return found
