"""Names that Wan's video transformer had before diffusers.

ComfyUI's files name its modules as its authors published them, musubi-tuner's too, with
underscores for dots. The rules are those of diffusers' own loaders.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_BLOCK = {
    **{f"self_attn_{part}": f"attn1_to_{part}" for part in "qkv"},
    **{f"cross_attn_{part}": f"attn2_to_{part}" for part in "qkv"},
    "self_attn_o": "attn1_to_out_0",
    "cross_attn_o": "attn2_to_out_0",
    "cross_attn_k_img": "attn2_add_k_proj",
    "cross_attn_v_img": "attn2_add_v_proj",
    "ffn_0": "ffn_net_0_proj",
    "ffn_2": "ffn_net_2",
}
_ENDS = {
    "time_projection_1": "condition_embedder_time_proj",
    "text_embedding_0": "condition_embedder_text_embedder_linear_1",
    "text_embedding_2": "condition_embedder_text_embedder_linear_2",
    "time_embedding_0": "condition_embedder_time_embedder_linear_1",
    "time_embedding_2": "condition_embedder_time_embedder_linear_2",
    "img_emb_proj_1": "condition_embedder_image_embedder_ff_net_0_proj",
    "img_emb_proj_3": "condition_embedder_image_embedder_ff_net_2",
    "head_head": "proj_out",
}


def wan_name(flat: str) -> str | None:
    """Return diffusers' name of a module of the original transformer of Wan.

    Args:
        flat: The original name, with underscores for dots, as in what is returned.

    >>> wan_name("blocks_3_cross_attn_k_img")
    'blocks_3_attn2_add_k_proj'
    """
    if flat in _ENDS:
        return _ENDS[flat]
    found = re.fullmatch(r"blocks_(\d+)_(.+)", flat)
    inside = _BLOCK.get(found[2]) if found else None
    return f"blocks_{found[1]}_{inside}" if found and inside else None


def published_wan_names(flat: Iterable[str]) -> dict[str, str]:
    """Return diffusers' name → the published one, if the names are those of modules of Wan.

    Args:
        flat: Names of all modules of an adapter, with underscores for dots.

    >>> published_wan_names(["blocks_3_attn2_add_k_proj", "proj_out"])
    {'blocks_3_attn2_add_k_proj': 'blocks_3_cross_attn_k_img', 'proj_out': 'head_head'}
    >>> published_wan_names(["proj_out"]), published_wan_names(["blocks_3_attn1_to_q", "mid_block"])
    ({}, {})
    """
    ends = {own: original for original, own in _ENDS.items()}
    inside = {own: original for original, own in _BLOCK.items()}
    names, blocks = {}, 0
    for name in flat:
        found = re.fullmatch(r"blocks_(\d+)_(.+)", name)
        if found and found[2] in inside:
            names[name] = f"blocks_{found[1]}_{inside[found[2]]}"
            blocks += 1
        elif name in ends:
            names[name] = ends[name]
        else:
            return {}
    return names if blocks else {}
