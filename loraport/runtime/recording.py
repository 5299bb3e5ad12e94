"""Record a bundle's golden cases: what the base, its adapters and a blend of two give.

Kernels of 4-bit and 8-bit products round their activations to 8 bits, and those in halves every sum
to 11. Sums in another order, as with another number of threads, other vector instructions or a
GPU, flip such roundings, and language models with a few very large activations magnify that. So
the distance from the same graph in float32 is measured: that is how far a runtime is that does not
round at all, and it is what golden cases allow where the table says less; but never so much that
one recorded case could be taken for another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loraport.bundle.golden import (
    BASE_CASE,
    GOLDEN_DIRECTORY,
    INPUT,
    OUTPUT,
    base_inputs,
    read_golden,
)
from loraport.bundle.manifest import MODEL_FILE, GoldenCase, Manifest, write_manifest
from loraport.errors import LoraportError
from loraport.output import new_file
from loraport.runtime.float32_graph import in_float32
from loraport.runtime.full_precision import rounds_activations
from loraport.runtime.model import Runtime
from loraport.runtime.values import holds_numbers

if TYPE_CHECKING:
    import numpy as np

Inputs = Mapping[str, "np.ndarray"]
BLEND_CASE = "blend"
# A cache is a means, not a result: its outputs are left out of the files.
_CACHE_OUTPUTS = ("present",)


class NotRecordedError(LoraportError):
    """A graph whose inputs or outputs no golden case can hold."""


def write_base_golden(bundle: Path, inputs: Inputs | Callable[[Runtime], Inputs]) -> Manifest:
    """Record the base's outputs for these inputs; adapters' cases use the same inputs.

    Args:
        bundle: The bundle's directory, with its manifest.
        inputs: All inputs of the model, without slots, or what makes them for the open bundle.

    Raises:
        NotRecordedError: If inputs or all outputs are no numbers.
    """
    (bundle / GOLDEN_DIRECTORY).mkdir(exist_ok=True)
    runtime = Runtime(bundle, check=False)
    if callable(inputs):
        inputs = inputs(runtime)
    manifest, cases = runtime.manifest, {BASE_CASE: GoldenCase({}, _file(BASE_CASE))}
    found = _run(runtime, cases, inputs)
    del runtime  # the graph that is measured beside needs as much memory
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
    del runtime  # the graph that is measured beside needs as much memory
    return _record(bundle, manifest, cases, inputs, found)


def _file(case: str) -> str:
    return f"{GOLDEN_DIRECTORY}/{case}.safetensors"


def _run(
    runtime: Runtime, cases: Mapping[str, GoldenCase], inputs: Inputs
) -> dict[str, dict[str, np.ndarray]]:
    """Return the outputs of every case."""
    wanted = _recorded(runtime.session)
    return {
        name: runtime.run(inputs, adapter=case.adapters or None, outputs=wanted)
        for name, case in cases.items()
    }


def _recorded(session: Any) -> list[str]:
    """Return the outputs that are written into golden cases.

    Raises:
        NotRecordedError: If it has none, or an input that no golden case can hold.
    """
    given, outputs = session.get_inputs(), session.get_outputs()
    others = [entry for entry in given if not holds_numbers(entry.type)]
    numbers = [entry.name for entry in outputs if holds_numbers(entry.type)]
    if not numbers:
        others = outputs
    if others:
        listed = ", ".join(f"{entry.name}: {entry.type}" for entry in others)
        raise NotRecordedError(f"golden cases hold arrays of numbers, got {listed}")
    return [name for name in numbers if not name.startswith(_CACHE_OUTPUTS)] or numbers


def _record(
    bundle: Path,
    manifest: Manifest,
    cases: Mapping[str, GoldenCase],
    inputs: Inputs,
    found: Mapping[str, Mapping[str, np.ndarray]],
) -> Manifest:
    import numpy as np
    from safetensors.numpy import save_file

    for name, case in cases.items():
        arrays = {f"{INPUT}{key}": array for key, array in inputs.items()}
        arrays |= {f"{OUTPUT}{key}": array for key, array in found[name].items()}
        # What does not lie by rows, as Fortran's arrays, would be written as if it did.
        arrays = {key: np.asarray(array, order="C") for key, array in arrays.items()}
        with new_file(bundle / case.file, force=True) as partial:
            save_file(arrays, partial)
    manifest = replace(manifest, golden={**manifest.golden, **cases})
    exact = in_float32(bundle / MODEL_FILE)
    if exact is not None or rounds_activations(bundle / MODEL_FILE):
        rounding = _rounding(bundle, exact, manifest, cases, inputs, found)
        manifest = _allowing(manifest, rounding, _apart(bundle, manifest, found))
    manifest = manifest.with_files(bundle, [case.file for case in cases.values()])
    write_manifest(manifest, bundle)
    return manifest


def _rounding(
    bundle: Path,
    exact: bytes | None,
    manifest: Manifest,
    cases: Mapping[str, GoldenCase],
    inputs: Inputs,
    found: Mapping[str, Mapping[str, np.ndarray]],
) -> float:
    """Return how far outputs are at most from those of a graph in float32; 0 if it does not run."""
    try:
        runtime = Runtime(bundle, check=False, graph=exact, float32_activations=True)
        runtime.manifest = manifest
        expected = _run(runtime, cases, inputs)
    except LoraportError:
        return 0.0
    return max((_difference(expected[name], outputs) for name, outputs in found.items()), default=0)


def _apart(
    bundle: Path, manifest: Manifest, found: Mapping[str, Mapping[str, np.ndarray]]
) -> float:
    """Return how far the outputs of two cases are at least from each other, of new ones and all."""
    least = math.inf
    for other, case in manifest.golden.items():
        theirs = found[other] if other in found else read_golden(bundle, case)[1]
        for name, outputs in found.items():
            if name != other:
                least = min(least, _difference(theirs, outputs))
    return least


def _difference(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> float:
    """Return how far outputs are at most from others; infinitely where one is not finite."""
    import numpy as np

    if not all(np.isfinite(each[key]).all() for key in one for each in (one, other)):
        return math.inf
    distances = (np.abs(one[key].astype(np.float64) - other[key]) for key in one)
    return max((float(distance.max(initial=0)) for distance in distances), default=0)


def _allowing(manifest: Manifest, rounding: float, apart: float) -> Manifest:
    """Return a manifest whose golden cases allow a rounding, in all runtimes.

    In tenths, and less than half of what cases are apart.
    """
    wide = [math.ceil(rounding * 10)] if math.isfinite(rounding) else [0]
    if math.isfinite(apart):
        wide.append(math.ceil(apart / 2 * 10) - 1)
    allowed = min(wide) / 10
    return replace(
        manifest,
        tolerance=max(manifest.tolerance, allowed),
        tolerances={name: max(bound, allowed) for name, bound in manifest.tolerances.items()},
    )
