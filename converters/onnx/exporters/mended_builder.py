"""``python -m converters.onnx.exporters.mended_builder``: GenAI's builder, with what it lacks.

What version 0.18 makes of some decoders by itself is not quite the model; each file that is named
in `_run` says what, and mends it in the process that runs the builder.
"""

from __future__ import annotations

import importlib
import runpy

from converters.onnx.exporters import (
    gemma_builder,
    layer_rotations,
    output_heads,
    scaled_rotations,
)

BUILDER = "onnxruntime_genai.models.builder"


def _run() -> None:
    importlib.import_module(BUILDER.rpartition(".")[0])  # makes the next one known
    builders = importlib.import_module("builders")
    for mended in (gemma_builder, layer_rotations, output_heads, scaled_rotations):
        mended.mend(builders)
    runpy.run_module(BUILDER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run()
