"""Record a bundle's golden cases: what the base, its adapters and a blend of two give."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.bundle.golden import BASE_CASE, GOLDEN_DIRECTORY, INPUT, OUTPUT, base_inputs
from loraport.bundle.manifest import GoldenCase, Manifest, write_manifest
from loraport.output import new_file
from loraport.runtime.model import Runtime

if TYPE_CHECKING:
    import numpy as np

BLEND_CASE = "blend"
# A cache is a means, not a result: its outputs are left out of the files.
_CACHE_OUTPUTS = ("present",)


def write_base_golden(
    bundle: Path, inputs: Mapping[str, np.ndarray], runtime: Runtime | None = None
) -> Manifest:
    """Record the base's outputs for these inputs; adapters' cases use the same inputs.

    Args:
        bundle: The bundle's directory, with its manifest.
        inputs: All inputs of the model, without slots.
        runtime: The bundle, where it is open already.
    """
    (bundle / GOLDEN_DIRECTORY).mkdir(exist_ok=True)
    return _record(runtime or Runtime(bundle, check=False), {BASE_CASE: {}}, inputs)


def write_golden(bundle: Path, manifest: Manifest, names: Iterable[str]) -> Manifest:
    """Record the outputs of adapters, and of the first two blended, for the base's inputs.

    The manifest is written with them, once all files are there.

    Args:
        bundle: The bundle's directory, with the adapters' files.
        manifest: Its manifest, which need not be written yet.
        names: The adapters whose outputs are recorded.

    Returns:
        The manifest with the golden cases.
    """
    runtime = Runtime(bundle, check=False)
    runtime.manifest = manifest
    inputs = base_inputs(bundle, manifest)
    cases: dict[str, dict[str, float]] = {f"adapter-{name}": {name: 1.0} for name in names}
    first_two = runtime.adapters[:2]
    if len(first_two) == 2 and BLEND_CASE not in manifest.golden:
        cases[BLEND_CASE] = {first_two[0]: 0.75, first_two[1]: 0.5}
    return _record(runtime, cases, inputs)


def _record(
    runtime: Runtime, cases: Mapping[str, Mapping[str, float]], inputs: Mapping[str, np.ndarray]
) -> Manifest:
    from safetensors.numpy import save_file

    bundle = runtime.directory
    names = [entry.name for entry in runtime.session.get_outputs()]
    wanted = [name for name in names if not name.startswith(_CACHE_OUTPUTS)]
    golden = dict(runtime.manifest.golden)
    for name, adapters in cases.items():
        outputs = runtime.run(inputs, adapter=adapters or None, outputs=wanted)
        arrays = {f"{INPUT}{key}": array for key, array in inputs.items()}
        arrays |= {f"{OUTPUT}{key}": array for key, array in outputs.items()}
        golden[name] = GoldenCase(dict(adapters), f"{GOLDEN_DIRECTORY}/{name}.safetensors")
        with new_file(bundle / golden[name].file, force=True) as partial:
            save_file(arrays, partial)
    manifest = replace(runtime.manifest, golden=golden)
    manifest = manifest.with_files(bundle, [golden[name].file for name in cases])
    write_manifest(manifest, bundle)
    return manifest
