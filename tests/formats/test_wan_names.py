"""Files for Wan's video transformer, whose modules have their authors' names, not diffusers'."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from converters.formats.registry import read_adapter, write_adapter
from loraport.errors import LoraportError

_WAN_ENDS = ("time_projection.1", "head.head", "text_embedding.0", "text_embedding.2")
_WAN_ENDS += ("time_embedding.0", "time_embedding.2", "img_emb.proj.1", "img_emb.proj.3")
_WAN_BLOCK = [f"{kind}_attn.{part}" for kind in ("self", "cross") for part in "qkvo"]
_WAN_BLOCK += ["cross_attn.k_img", "cross_attn.v_img", "ffn.0", "ffn.2"]


def wan_transformer():
    """A transformer with Wan's modules, image conditions among them, tiny."""
    from diffusers import WanTransformer3DModel

    torch.manual_seed(0)
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=20,
        num_layers=2,
        image_dim=8,
        added_kv_proj_dim=24,
    )


@pytest.mark.parametrize("saved_by", ["comfyui", "musubi"])
def test_wan_as_diffusers_reads_it(saved_by, tmp_path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers.loaders import lora_conversion_utils as rules

    model = wan_transformer()
    model.save_pretrained(tmp_path / "transformer")
    names = [f"blocks.{layer}.{name}" for layer in range(2) for name in _WAN_BLOCK]
    names += _WAN_ENDS if saved_by == "comfyui" else ()
    tensors = {}
    for name in names:
        musubi = saved_by == "musubi"
        key = f"lora_unet_{name.replace('.', '_')}" if musubi else f"diffusion_model.{name}"
        a, b = ("lora_down", "lora_up") if musubi else ("lora_A", "lora_B")
        tensors[f"{key}.{a}.weight"] = torch.randn(2, 5)
        tensors[f"{key}.{b}.weight"] = torch.randn(24, 2)
        if musubi:
            tensors[f"{key}.alpha"] = torch.tensor(3.0)
    save_file(tensors, tmp_path / "x.safetensors")
    read_as = {
        "comfyui": rules._convert_non_diffusers_wan_lora_to_diffusers,
        "musubi": rules._convert_musubi_wan_lora_to_diffusers,
    }
    expected = read_as[saved_by](dict(tensors))
    back = read_adapter(tmp_path / "x.safetensors", base=str(tmp_path / "transformer"))
    assert len(back.modules) == len(names) == len(expected) // 2
    weights = model.state_dict()
    for path, module in back.modules.items():
        assert f"{path}.weight" in weights
        wanted = [expected[f"transformer.{path}.lora_{part}.weight"] for part in "BA"]
        got = module.scaling * module.lora_B @ module.lora_A
        torch.testing.assert_close(got, wanted[0] @ wanted[1], rtol=1e-5, atol=1e-6)
    write_adapter(back, tmp_path / "y", "diffusers", base=str(tmp_path / "transformer"))
    written = load_file(tmp_path / "y" / "pytorch_lora_weights.safetensors")
    assert written.keys() == expected.keys()
    if saved_by == "musubi":  # what ComfyUI and diffusers take is the published names alone
        write_adapter(back, tmp_path / "k", "kohya", base=str(tmp_path / "transformer"))
        stored = load_file(tmp_path / "k")
        assert stored.keys() == tensors.keys()
        for name, tensor in read_as["musubi"](dict(stored)).items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=0)
        for base in (None, str(tmp_path / "transformer")):
            again = read_adapter(tmp_path / "k", base=base).modules
            assert again.keys() == back.modules.keys()
            assert all(torch.equal(again[path].lora_B, back.modules[path].lora_B) for path in again)
    if saved_by == "comfyui":
        published = read_adapter(tmp_path / "x.safetensors")
        assert set(published.modules) == set(names)
        with pytest.raises(LoraportError, match=r"one of Wan as it was published; give --base"):
            write_adapter(published, tmp_path / "z", "diffusers")
