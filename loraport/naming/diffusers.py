"""diffusers' names: ``unet.<module path>.lora_A.weight``, and those that older versions wrote.

ComfyUI's are the same but for the model's name, ``diffusion_model``, and the paths in it.
"""

from __future__ import annotations

import re

COMPONENTS = ("transformer", "unet", "text_encoder", "text_encoder_2")
ORIGINAL_MODEL = "diffusion_model"  # the model as published, in the files that ComfyUI reads
_UNET_BLOCKS = ("down_blocks", "mid_block", "up_blocks")  # a file of a UNet alone begins so
_OLDER = re.compile(
    r"(.+)\.(?:to_([qkv]|out)_lora\.|lora_linear_layer\.|lora[._])(up|down)\.weight"
)


def parse_diffusers_key(key: str) -> tuple[str, str] | None:
    """Split a tensor name into the pipeline's component and the name in it, as written today.

    The rules for older names are those of diffusers' own ``state_dict_utils``.

    >>> parse_diffusers_key("unet.conv_in.lora.up.weight")
    ('unet', 'conv_in.lora_B.weight')
    >>> parse_diffusers_key("down_blocks.0.attn1.processor.to_out_lora.down.weight")
    ('unet', 'down_blocks.0.attn1.to_out.0.lora_A.weight')
    """
    head, _, rest = key.partition(".")
    if head in _UNET_BLOCKS:
        head, rest = "unet", key
    if head not in (*COMPONENTS, ORIGINAL_MODEL):
        return None
    older = _OLDER.fullmatch(rest.replace(".processor.", "."))
    if older is None:
        return head, rest
    path, attention, which = older.groups()
    if attention and head.startswith("text_encoder"):
        path += f".{attention}_proj"  # transformers' names of what diffusers' attention has
    elif attention:
        path += ".to_out.0" if attention == "out" else f".to_{attention}"
    return head, f"{path}.{'lora_A' if which == 'down' else 'lora_B'}.weight"
