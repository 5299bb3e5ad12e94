"""``python -m converters.onnx.exporters.mended_builder``: GenAI's builder, with what it lacks.

What version 0.18 makes of some decoders by itself is not quite the model; each file that is named
in `_run` says what, and mends it in the process that runs the builder.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import runpy
import sys
from typing import Any

from converters.onnx.exporters import (
    gemma_builder,
    layer_rotations,
    output_heads,
    scaled_rotations,
)

BUILDER = "onnxruntime_genai.models.builder"
_VERSION = "0.18"


def mend(builders: Any) -> None:
    """Let the builder make of decoders what they are.

    Args:
        builders: The builder's module of that name; changed in place.

    Raises:
        SystemExit: With what to install, if it lacks something that is to be mended.
    """
    try:
        for part in (gemma_builder, layer_rotations, output_heads, scaled_rotations):
            part.mend(builders)
    except AttributeError as error:
        names = importlib.metadata.packages_distributions().get("onnxruntime_genai", [])
        got = " ".join(f"{name} {importlib.metadata.version(name)}" for name in sorted(set(names)))
        sys.exit(
            f"expected ONNX Runtime GenAI's builder as of version {_VERSION}, "
            f"got {got or 'another'} ({error}); install version {_VERSION}.*"
        )


def _run() -> None:
    importlib.import_module(BUILDER.rpartition(".")[0])  # makes the next one known
    mend(importlib.import_module("builders"))
    runpy.run_module(BUILDER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run()
