"""Files of adapters that are in none of the formats, told by their tensors' names."""

from __future__ import annotations

import re
from pathlib import Path

from loraport.base.checkpoint import read_header
from loraport.errors import LoraportError

_OWN_TOOL = "merge it with the tool that made it"
_BY_DIFFUSERS = "load it with diffusers, and save it with save_lora_weights"
_WRAPPED, _LORA = ".base_layer.", ".lora_"
# Pattern of a tensor's name → what the file is, and what to do. The first that fits counts.
_KINDS: tuple[tuple[str, str, str], ...] = (
    (r"(.+\.)?lokr_\w+", "an adapter of LyCORIS's kind LoKr, which is no product A B", _OWN_TOOL),
    (r"(.+\.)?hada_\w+", "an adapter of LyCORIS's kind LoHa, which is no product A B", _OWN_TOOL),
    (r"(.+\.)?oft_\w+(\.\w+)?", "an OFT adapter, which turns weights", _OWN_TOOL),
    (r".+\.diff(_b)?", "whole differences of weights (.diff), not LoRA", _OWN_TOOL),
    (r"(double|single)_blocks\.\d+\.processor\..+", "xlabs' LoRA for Flux", _BY_DIFFUSERS),
    (r"lora_transformer_.+", "OneTrainer's LoRA of a transformer", _BY_DIFFUSERS),
    (r"lycoris_.+", "a LyCORIS file, whose names have no dots", _BY_DIFFUSERS),
    (
        r"base_model\.model\..+\.lora_.+",
        "the tensors of an adapter of PEFT's without its configuration",
        "put it into a directory as adapter_model.safetensors, beside its adapter_config.json",
    ),
    (
        r".+\.lora[._](A|B|a|b|down|up)(\.\w+)*",
        "LoRA whose modules are named in a way of its own",
        "convert it to PEFT's layout with the tool that made it",
    ),
)


def foreign_adapter(path: Path) -> tuple[str, str] | None:
    """Tell what a safetensors file is that holds an adapter in no known format.

    Returns:
        What it is, with the name of a tensor that shows it, and what to do; ``None`` where it is
        no such file.
    """
    if not path.is_file():
        return None
    try:
        tensors, _ = read_header(path)
    except LoraportError:
        return None
    if any(_WRAPPED in name and _LORA not in name for name in tensors):
        return None  # a whole model with an adapter inside
    for pattern, kind, remedy in _KINDS:
        shown = next((name for name in tensors if re.fullmatch(pattern, name)), None)
        if shown is not None:
            return f"{kind} ({shown})", remedy
    return None
