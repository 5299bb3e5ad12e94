"""Record a bundle's golden cases: what the base, its adapters and a blend of two give.

Kernels of 4-bit and 8-bit products round their activations to 8 bits. Sums in another order, as
with another number of threads or other vector instructions, flip such roundings, and language
models with a few very large activations magnify that. So their distance from the same products
with float32 activations is measured: that is how far a runtime is that does not round at all, those
that flip some roundings are nearer, and it is what golden cases allow where the table says less.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.bundle.golden import BASE_CASE, GOLDEN_DIRECTORY, INPUT, OUTPUT, base_inputs
from loraport.bundle.manifest import MODEL_FILE, GoldenCase, Manifest, write_manifest
from loraport.output import new_file
from loraport.runtime.full_precision import with_float32_activations
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
    runtime = runtime or Runtime(bundle, check=False)
    manifest, cases = runtime.manifest, {BASE_CASE: GoldenCase({}, _file(BASE_CASE))}
    found = _run(runtime, cases, inputs)
    del runtime
    return _record(bundle, manifest, cases, inputs, found)


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
    parts: dict[str, dict[str, float]] = {f"adapter-{name}": {name: 1.0} for name in names}
    first_two = runtime.adapters[:2]
    if len(first_two) == 2 and BLEND_CASE not in manifest.golden:
        parts[BLEND_CASE] = {first_two[0]: 0.75, first_two[1]: 0.5}
    cases = {name: GoldenCase(adapters, _file(name)) for name, adapters in parts.items()}
    found = _run(runtime, cases, inputs)
    del runtime
    return _record(bundle, manifest, cases, inputs, found)


def _file(case: str) -> str:
    return f"{GOLDEN_DIRECTORY}/{case}.safetensors"


def _run(
    runtime: Runtime, cases: Mapping[str, GoldenCase], inputs: Mapping[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """Return the outputs of every case."""
    names = [entry.name for entry in runtime.session.get_outputs()]
    wanted = [name for name in names if not name.startswith(_CACHE_OUTPUTS)]
    return {
        name: runtime.run(inputs, adapter=case.adapters or None, outputs=wanted)
        for name, case in cases.items()
    }


def _record(
    bundle: Path,
    manifest: Manifest,
    cases: Mapping[str, GoldenCase],
    inputs: Mapping[str, np.ndarray],
    found: Mapping[str, Mapping[str, np.ndarray]],
) -> Manifest:
    from safetensors.numpy import save_file

    for name, case in cases.items():
        arrays = {f"{INPUT}{key}": array for key, array in inputs.items()}
        arrays |= {f"{OUTPUT}{key}": array for key, array in found[name].items()}
        with new_file(bundle / case.file, force=True) as partial:
            save_file(arrays, partial)
    manifest = replace(manifest, golden={**manifest.golden, **cases})
    if with_float32_activations(bundle / MODEL_FILE) is not None:
        manifest = _allowing(manifest, _rounding(bundle, manifest, cases, inputs, found))
    manifest = manifest.with_files(bundle, [case.file for case in cases.values()])
    write_manifest(manifest, bundle)
    return manifest


def _rounding(
    bundle: Path,
    manifest: Manifest,
    cases: Mapping[str, GoldenCase],
    inputs: Mapping[str, np.ndarray],
    found: Mapping[str, Mapping[str, np.ndarray]],
) -> float:
    """Return how far outputs are at most from those of float32 activations."""
    import numpy as np

    exact = Runtime(bundle, check=False, float32_activations=True)
    exact.manifest = manifest
    return max(
        float(np.abs(expected[key].astype(np.float64) - found[name][key]).max(initial=0))
        for name, expected in _run(exact, cases, inputs).items()
        for key in expected
    )


def _allowing(manifest: Manifest, distance: float) -> Manifest:
    """Return a manifest whose golden cases may be so far off, to a tenth, in all runtimes."""
    if not math.isfinite(distance):
        return manifest
    least = math.ceil(distance * 10) / 10
    return replace(
        manifest,
        tolerance=max(manifest.tolerance, least),
        tolerances={name: max(bound, least) for name, bound in manifest.tolerances.items()},
    )
