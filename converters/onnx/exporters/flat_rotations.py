"""``python -m converters.onnx.exporters.flat_rotations``: GenAI's builder, for Gemma 3.

transformers 5 keeps a model's rotations by kind of layer. Version 0.18 of the builder looks for
those of full attention at the top, and for the base of the others as ``rope_local_base_freq``.
`require_rotations` holds what comes of it against the model.
"""

from __future__ import annotations

import runpy
from typing import Any

BUILDER = "onnxruntime_genai.models.builder"
FULL, SLIDING = "full_attention", "sliding_attention"


def flatten(config: Any) -> Any:
    """Put a configuration's rotations where the builder reads them, in place; others stay."""
    kinds: Any = getattr(config, "rope_parameters", None)
    if isinstance(kinds, dict) and FULL in kinds:
        full = kinds[FULL]
        sliding: Any = kinds.get(SLIDING) or full
        config.rope_local_base_freq = sliding["rope_theta"]
        config.rope_parameters = dict(full)
    return config


def _run() -> None:
    from transformers import AutoConfig

    load = AutoConfig.from_pretrained

    def loaded(*arguments: Any, **named: Any) -> Any:
        found = load(*arguments, **named)
        # A model that is loaded asks for what it does not use, too: it needs its own.
        return found if isinstance(found, tuple) else flatten(found)

    AutoConfig.from_pretrained = loaded
    runpy.run_module(BUILDER, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _run()
