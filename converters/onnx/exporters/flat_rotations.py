"""The rotations of Gemma 3, for GenAI's builder.

transformers 5 keeps a model's rotations by kind of layer. Version 0.18 of the builder looks for
those of full attention at the top, and for the base of the others as ``rope_local_base_freq``.
`require_rotations` holds what comes of it against the model.
"""

from __future__ import annotations

from typing import Any

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
