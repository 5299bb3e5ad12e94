"""Targets that PEFT 0.21 takes for something else when it reads an adapter.

For models whose experts transformers 5 keeps in one parameter, PEFT rewrites targets of the former
experts' names to that parameter (``_convert_peft_config_moe``), by their last name alone. So it
does for dense and shared layers that still have these names, whatever path a target gives: it
leaves their matrices out, and puts untrained ones on the experts. No configuration prevents it.
"""

from __future__ import annotations

from collections.abc import Iterable

# By the model whose experts a model's are like, as transformers has it.
_FORMER_NAMES = {
    "mixtral": ("gate", "w1", "w2", "w3"),
    "qwen2_moe": ("gate", "gate_proj", "up_proj", "down_proj"),
}


def misread_by_peft(model_type: str | None, paths: Iterable[str]) -> str | None:
    """Return what a user of PEFT should know of an adapter, if anything.

    Args:
        model_type: Of the base, as its configuration has it.
        paths: The modules adapted.
    """
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as ALIKE
    except ImportError:  # it is not public
        return None
    experts = {**ALIKE, "mixtral": "mixtral"}.get(model_type or "", "")
    names = {path.rpartition(".")[2] for path in paths}
    wrong = [name for name in _FORMER_NAMES.get(experts, ()) if name in names]
    if not wrong:
        return None
    return (
        f"PEFT 0.21 will not read this adapter as it is: in models of type {model_type} it takes "
        f"{', '.join(wrong)} for the experts'; every command of loraport reads it, and `loraport "
        f"merge` makes a checkpoint of it; for PEFT, leave them out: --exclude {','.join(wrong)}"
    )
