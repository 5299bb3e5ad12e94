"""Golden cases: inputs and the outputs they must give, kept in the bundle.

A case is one ``.safetensors`` file with ``input.NAME`` and ``output.NAME`` tensors, so a
runner in any language can check itself. The outputs are ONNX Runtime's on the CPU; that these
are PyTorch's too is what ``loraport verify`` proves.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from loraport.base.checkpoint import Checkpoint
from loraport.bundle.manifest import (
    MANIFEST_FILE,
    GoldenCase,
    Manifest,
    read_manifest,
    write_manifest,
)
from loraport.errors import LoraportError

if TYPE_CHECKING:
    import numpy as np

GOLDEN_DIRECTORY = "golden"
BASE_CASE = "base"
_NONE = f"{GOLDEN_DIRECTORY}/none.txt"
INPUT = "input."
OUTPUT = "output."


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
    inputs = {n.removeprefix(INPUT): a for n, a in arrays.items() if n.startswith(INPUT)}
    outputs = {n.removeprefix(OUTPUT): a for n, a in arrays.items() if n.startswith(OUTPUT)}
    return inputs, outputs
