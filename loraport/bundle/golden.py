"""Golden cases: inputs and the outputs they must give, kept in the bundle.

A case is one ``.safetensors`` file with ``input.NAME`` and ``output.NAME`` tensors, so a
runner in any language can check itself. The outputs are ONNX Runtime's on the CPU; that these
are PyTorch's too is what ``loraport verify`` proves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from loraport.bundle.manifest import (
    MANIFEST_FILE,
    GoldenCase,
    Manifest,
    read_manifest,
    write_manifest,
)
from loraport.checkpoint import Checkpoint
from loraport.errors import LoraportError
from loraport.output import new_file

if TYPE_CHECKING:
    import numpy as np

    from loraport.runtime import Runtime

GOLDEN_DIRECTORY = "golden"
BASE_CASE = "base"
BLEND_CASE = "blend"
_NONE = f"{GOLDEN_DIRECTORY}/none.txt"
_INPUT = "input."
_OUTPUT = "output."
# A cache is a means, not a result: its outputs are left out of the files.
_CACHE_OUTPUTS = ("present",)


def record_no_golden(bundle: Path, reason: str) -> Manifest:
    """Record why a bundle can have no golden cases."""
    (bundle / GOLDEN_DIRECTORY).mkdir(exist_ok=True)
    (bundle / _NONE).write_text(reason + "\n")
    manifest = read_manifest(bundle).with_files(bundle, [_NONE])
    write_manifest(manifest, bundle)
    return manifest


def golden_reason(bundle: Path) -> str | None:
    """Return why a bundle has no golden cases, if that was recorded."""
    file = bundle / _NONE
    return file.read_text().strip() if file.is_file() else None


def write_base_golden(bundle: Path, inputs: Mapping[str, np.ndarray]) -> Manifest:
    """Record the base's outputs for these inputs; adapters' cases use the same inputs."""
    from loraport.runtime import Runtime

    (bundle / GOLDEN_DIRECTORY).mkdir(exist_ok=True)
    return _record(Runtime(bundle, check=False), {BASE_CASE: {}}, inputs)


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
    from loraport.runtime import Runtime

    runtime = Runtime(bundle, check=False)
    runtime.manifest = manifest
    inputs = base_inputs(bundle, manifest)
    cases: dict[str, dict[str, float]] = {f"adapter-{name}": {name: 1.0} for name in names}
    first_two = runtime.adapters[:2]
    if len(first_two) == 2 and BLEND_CASE not in manifest.golden:
        cases[BLEND_CASE] = {first_two[0]: 0.75, first_two[1]: 0.5}
    return _record(runtime, cases, inputs)


def base_inputs(bundle: Path, manifest: Manifest) -> dict[str, np.ndarray]:
    """Return the inputs that all golden cases share.

    Raises:
        LoraportError: If the base's case is missing.
    """
    case = manifest.golden.get(BASE_CASE)
    if case is None:
        raise LoraportError(
            f"bundle {bundle}: golden case {BASE_CASE!r}: expected it in {MANIFEST_FILE}, got "
            "none; export the base again"
        )
    return read_golden(bundle, case)[0]


def read_golden(
    bundle: Path, case: GoldenCase
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return a case's inputs and expected outputs by name."""
    checkpoint = Checkpoint(bundle / case.file)
    arrays = {name: checkpoint.load_array(name) for name in checkpoint}
    inputs = {n.removeprefix(_INPUT): a for n, a in arrays.items() if n.startswith(_INPUT)}
    outputs = {n.removeprefix(_OUTPUT): a for n, a in arrays.items() if n.startswith(_OUTPUT)}
    return inputs, outputs


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
        arrays = {f"{_INPUT}{key}": array for key, array in inputs.items()}
        arrays |= {f"{_OUTPUT}{key}": array for key, array in outputs.items()}
        golden[name] = GoldenCase(dict(adapters), f"{GOLDEN_DIRECTORY}/{name}.safetensors")
        with new_file(bundle / golden[name].file, force=True) as partial:
            save_file(arrays, partial)
    manifest = replace(runtime.manifest, golden=golden)
    manifest = manifest.with_files(bundle, [golden[name].file for name in cases])
    write_manifest(manifest, bundle)
    return manifest
