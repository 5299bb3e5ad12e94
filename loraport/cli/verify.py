"""``loraport verify``."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from loraport.cli.options import log, progress
from loraport.counts import counted
from loraport.errors import LoraportError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from loraport.adapter import Adapter
    from loraport.bundle.manifest import Manifest
    from loraport.parity import Verification


@click.command()
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--base", help="The PyTorch model; where the bundle was exported from unless given.")
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="NAME[=ADAPTER]",
    help="Verify these only; and where the adapter lies, if it has moved since it was added.",
)
@click.option("--provider", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def verify(
    bundle: Path, base: str | None, adapters: tuple[str, ...], provider: str, as_json: bool
) -> None:
    """Prove that BUNDLE computes what PyTorch computes; exit code 1 if it does not."""
    from loraport.bundle.manifest import read_manifest
    from loraport.bundle.sources import base_source
    from loraport.cli.reports import print_verification
    from loraport.parity import verify_bundle

    manifest = read_manifest(bundle)
    found = base or base_source(bundle)
    if found is None:
        raise LoraportError(
            f"bundle {bundle}: expected to know the base it was exported from; give --base"
        )
    sources = _adapter_sources(bundle, manifest, adapters)
    model, original = _reference_model(found, bundle, manifest, sources)
    report = verify_bundle(
        bundle, model, sources, provider=provider, original=original, progress=progress
    )
    if as_json:
        click.echo(json.dumps(report.to_json(), indent=1))
    else:
        print_verification(report)
    if report.passed:
        log.print("parity holds")
    else:
        log.print(f"parity fails{_cause(report)}", style="red")
    sys.exit(0 if report.passed else 1)


def _cause(report: Verification) -> str:
    if not report.calibrated:
        return ""
    return (
        " by the graph's own calibrated quantization alone, which cuts off what an adapter makes "
        "larger: calibrate it anew with inputs and ranges that leave room, or export it in another "
        "precision"
    )


def _adapter_sources(
    bundle: Path, manifest: Manifest, chosen: tuple[str, ...]
) -> dict[str, Adapter]:
    """Read the adapters as they were trained, by their names in the bundle."""
    from converters.formats.registry import read_adapter
    from converters.onnx.packing.pack import adapter_sha256
    from loraport.bundle.sources import adapter_source

    wanted = dict(choice.partition("=")[::2] for choice in chosen) or dict.fromkeys(
        manifest.adapters, ""
    )
    found = {}
    for name, given in wanted.items():
        entry = manifest.require_adapter(name)
        path = given or adapter_source(bundle, name)
        if not path or not Path(path).exists():
            raise LoraportError(
                f"adapter {name!r}: expected the adapter it was packed from"
                f"{f' at {path}' if path else ', which the bundle does not say'}, got none; "
                f"give --adapter {name}=PATH"
            )
        adapter = read_adapter(Path(path))
        if adapter_sha256(adapter) != entry.source_sha256:
            raise LoraportError(
                f"adapter {name!r}: expected the one it was packed from "
                f"({entry.source_sha256[:12]}), got another at {path}; give "
                f"--adapter {name}=PATH, or add it again with --force"
            )
        found[name] = adapter
    return found


def _reference_model(
    base: str, bundle: Path, manifest: Manifest, adapters: Mapping[str, Adapter]
) -> tuple[PreTrainedModel, Callable[[str], torch.Tensor]]:
    """Load the base; with the graph's own rounded weights where those are quantized.

    Returns:
        The model, and what gives the parameters that the adapters were made for.
    """
    from converters.onnx.exporters.loading import load_exported
    from converters.onnx.modules.graph_weights import load_graph_weights
    from loraport.base.finding import resolve_base
    from loraport.base.loading import fingerprint_model
    from loraport.base.stored_tensors import stored_tensor, stored_tensors
    from loraport.bundle.manifest import MODEL_FILE

    progress(f"loading {base} in PyTorch")
    model = load_exported(resolve_base(base), progress)
    paths = [path for path, _ in model.named_modules() if path in manifest.fingerprint.modules]
    manifest.fingerprint.require_same_base(
        fingerprint_model(model, paths), f"bundle {bundle}", f"base {base}"
    )
    kept: dict[str, torch.Tensor] = {}
    if manifest.precision in ("int4", "int8"):
        names = {name for adapter in adapters.values() for name in _compared(adapter)}
        known = stored_tensors(model)
        kept = {name: known[name].detach().clone() for name in names & known.keys()}
        replaced = load_graph_weights(bundle / MODEL_FILE, model)
        progress(f"{counted(len(replaced), 'weight')} taken dequantized from the graph")
    return model, lambda name: kept[name] if name in kept else stored_tensor(model, name)


def _compared(adapter: Adapter) -> Iterator[str]:
    """Yield the parameters whose values in the base an adapter's effect depends on."""
    from loraport.naming import weight_name

    yield from adapter.replacements
    for path, module in adapter.modules.items():
        if module.magnitude is not None:
            yield weight_name(path)
