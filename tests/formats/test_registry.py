import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from converters.formats.registry import adapter_formats, read_adapter, write_adapter
from loraport.adapter import Adapter
from loraport.cli.descriptions import describe
from loraport.errors import LoraportError


def test_peft_is_found() -> None:
    assert "peft" in adapter_formats()


def test_names_are_the_keys_and_nothing_heavy_is_needed_to_list_them() -> None:
    assert all(name == found.name for name, found in adapter_formats().items())


def test_an_unknown_thing_is_refused_with_the_known_formats(tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(b"nothing that is known")
    with pytest.raises(LoraportError, match=r"expected one of the known formats \(.*peft"):
        read_adapter(tmp_path / "x.bin")
    with pytest.raises(LoraportError, match="got none there"):
        read_adapter(tmp_path / "absent")


def test_where_the_adapter_lies_is_told(tmp_path: Path) -> None:
    """PEFT saves an adapter that is not called "default" in a directory of that name."""
    for name in ("style", "tone"):
        (tmp_path / "saved" / name).mkdir(parents=True)
        (tmp_path / "saved" / name / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "saved" / "runs").mkdir()
    with pytest.raises(
        LoraportError, match=r"got a directory of adapters.*saved/style.*saved/tone"
    ):
        read_adapter(tmp_path / "saved")
    weights = tmp_path / "saved" / "style" / "adapter_model.safetensors"
    save_file({"base_model.model.fc.lora_A.weight": torch.ones(2, 3)}, weights)
    expected = rf"got a file of one that peft keeps in a directory; give {weights.parent}$"
    with pytest.raises(LoraportError, match=expected):
        read_adapter(weights)


def test_an_unknown_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LoraportError, match=r"expected one of .*peft"):
        write_adapter(Adapter(modules={}), tmp_path / "out", "zip")


_FOREIGN = {
    "diffusion_model.layers.0.attention.to_q.lokr_w1": "LyCORIS's kind LoKr",
    "lora_unet_x.hada_w1_a": "LyCORIS's kind LoHa",
    "lora_unet_x.oft_blocks": "an OFT adapter",
    "diffusion_model.img_in.diff": "whole differences of weights",
    "double_blocks.0.processor.qkv_lora1.down.weight": "xlabs' LoRA for Flux",
    "lora_transformer_single_transformer_blocks_0_attn_to_k.lora_down.weight": "OneTrainer's",
    "lycoris_transformer_blocks_0_attn_to_q.lora_down.weight": "a LyCORIS file",
    "base_model.model.fc.lora_A.weight": "without its configuration",
    "base_model.model.mlp.experts.base_layer.lora_A.weight": "without its configuration",
    "blocks.0.attn.lora_A.weight": "named in a way of its own",
}


@pytest.mark.parametrize("name", _FOREIGN)
def test_adapters_of_other_tools_are_told_by_name(name, tmp_path: Path) -> None:
    """Of all commands alike; ``inspect`` would else call them checkpoints."""
    file = tmp_path / "x.safetensors"
    save_file({name: torch.ones(2, 3)}, file)
    expected = f"expected one of the known formats, got .*{_FOREIGN[name]}.*{re.escape(name)}.*; "
    for read in (read_adapter, describe):
        with pytest.raises(LoraportError, match=expected) as refused:
            read(file)
        assert len(str(refused.value).splitlines()) == 1


def test_a_checkpoint_is_no_adapter_of_another_tool(tmp_path: Path) -> None:
    names = ("model.layers.0.q_proj.weight", "explora.weight", "lora", "a.diffusion.weight")
    injected = ("q_proj.base_layer.weight", "q_proj.lora_A.default.weight")
    for each in (injected, names):
        save_file({name: torch.ones(2, 3) for name in each}, tmp_path / "x.safetensors")
        assert describe(tmp_path / "x.safetensors").kind == "checkpoint"
    with pytest.raises(LoraportError, match="peft"):
        read_adapter(tmp_path / "x.safetensors")
