"""Names that diffusion models had before diffusers: the UNet of SDXL, the transformer of Flux.

sd-scripts trains those models as their authors published them, so its files name their modules;
all dots are underscores. The rules are those of diffusers' own loaders.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_UNET_ENDS = {
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
}
_RESNET = {
    "in_layers_2": "conv1",
    "out_layers_3": "conv2",
    "emb_layers_1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
}
_MIDDLE = {"0": "resnets_0", "1": "attentions_0", "2": "resnets_1"}


def unet_name(flat: str, layers_per_block: int) -> str | None:
    """Return diffusers' name of a module of the original UNet, both with underscores for dots.

    Args:
        flat: The original name.
        layers_per_block: Of diffusers' configuration of the UNet.

    >>> unet_name("input_blocks_4_1_transformer_blocks_0_attn1_to_q", 2)
    'down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q'
    >>> unet_name("output_blocks_2_2_conv", 2)
    'up_blocks_0_upsamplers_0_conv'
    """
    if flat in _UNET_ENDS:
        return _UNET_ENDS[flat]
    middle = re.fullmatch(r"middle_block_([012])_(.+)", flat)
    if middle:
        inner = _MIDDLE[middle[1]]
        return _inside(f"mid_block_{inner}", middle[2], resnet=inner.startswith("resnets"))
    found = re.fullmatch(r"(input|output)_blocks_(\d+)_([012])_(.+)", flat)
    if found is None:
        return None
    number, inner, rest = int(found[2]), found[3], found[4]
    side = "down" if found[1] == "input" else "up"
    if side == "down":
        number -= 1
    block, layer = divmod(number, layers_per_block + 1)
    if number < 0:
        return None
    if rest == ("op" if side == "down" else "conv"):
        return f"{side}_blocks_{block}_{side}samplers_0_conv"
    if inner == "2":
        return None
    kind = ("resnets", "attentions")[int(inner)]
    return _inside(f"{side}_blocks_{block}_{kind}_{layer}", rest, resnet=kind == "resnets")


def _inside(module: str, rest: str, *, resnet: bool) -> str | None:
    if not resnet:
        return f"{module}_{rest}"
    return f"{module}_{_RESNET[rest]}" if rest in _RESNET else None


@dataclass(frozen=True)
class FluxModules:
    """What one module of the original transformer is in diffusers' one.

    Attributes:
        names: Its modules, whose weights lie one under the other in the original's, with
            underscores for dots.
        halves_swapped: The two halves of the rows are exchanged (scale and shift).
    """

    names: tuple[str, ...]
    halves_swapped: bool = False


_DOUBLE = {
    "img_attn_proj": ("attn_to_out_0",),
    "img_attn_qkv": ("attn_to_q", "attn_to_k", "attn_to_v"),
    "img_mlp_0": ("ff_net_0_proj",),
    "img_mlp_2": ("ff_net_2",),
    "img_mod_lin": ("norm1_linear",),
    "txt_attn_proj": ("attn_to_add_out",),
    "txt_attn_qkv": ("attn_add_q_proj", "attn_add_k_proj", "attn_add_v_proj"),
    "txt_mlp_0": ("ff_context_net_0_proj",),
    "txt_mlp_2": ("ff_context_net_2",),
    "txt_mod_lin": ("norm1_context_linear",),
}
_SINGLE = {
    "linear1": ("attn_to_q", "attn_to_k", "attn_to_v", "proj_mlp"),
    "linear2": ("proj_out",),
    "modulation_lin": ("norm_linear",),
}
_FLUX_ENDS = {
    "img_in": "x_embedder",
    "txt_in": "context_embedder",
    "time_in_in_layer": "time_text_embed_timestep_embedder_linear_1",
    "time_in_out_layer": "time_text_embed_timestep_embedder_linear_2",
    "vector_in_in_layer": "time_text_embed_text_embedder_linear_1",
    "vector_in_out_layer": "time_text_embed_text_embedder_linear_2",
    "guidance_in_in_layer": "time_text_embed_guidance_embedder_linear_1",
    "guidance_in_out_layer": "time_text_embed_guidance_embedder_linear_2",
    "final_layer_linear": "proj_out",
}


def flux_modules(flat: str) -> FluxModules | None:
    """Return diffusers' modules of a module of the original Flux transformer.

    Args:
        flat: The original name with underscores for dots.

    >>> flux_modules("double_blocks_3_img_attn_qkv").names[1]
    'transformer_blocks_3_attn_to_k'
    """
    if flat in _FLUX_ENDS:
        return FluxModules((_FLUX_ENDS[flat],))
    if flat == "final_layer_adaLN_modulation_1":
        return FluxModules(("norm_out_linear",), halves_swapped=True)
    found = re.fullmatch(r"(double|single)_blocks_(\d+)_(.+)", flat)
    if found is None:
        return None
    inside: Sequence[str] | None = (_DOUBLE if found[1] == "double" else _SINGLE).get(found[3])
    if inside is None:
        return None
    block = "transformer_blocks" if found[1] == "double" else "single_transformer_blocks"
    return FluxModules(tuple(f"{block}_{found[2]}_{module}" for module in inside))


def is_transformer_path(module_path: str) -> bool:
    """Tell whether a path is one of a diffusion transformer of diffusers.

    >>> is_transformer_path("transformer.single_transformer_blocks.0.attn.to_q")
    True
    """
    blocks = ("transformer_blocks.", "single_transformer_blocks.")
    return module_path.removeprefix("transformer.").startswith(blocks)
