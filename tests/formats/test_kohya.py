"""sd-scripts' files: its own rules applied independently, and names that need the base."""

import pytest
import torch
from peft_cases import inputs, load_with_peft
from safetensors.torch import load_file, save_file

from converters.formats.registry import read_adapter, write_adapter
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.errors import LoraportError


def _apply_as_sd_scripts_does(model: torch.nn.Module, file) -> None:
    """Merge by sd-scripts' rules: names with underscores, scale = alpha / rank, up times down."""
    weights = load_file(file)
    for name, module in model.named_modules():
        key = "lora_unet_" + name.replace(".", "_")
        if f"{key}.lora_down.weight" not in weights:
            continue
        down = weights.pop(f"{key}.lora_down.weight").double()
        up = weights.pop(f"{key}.lora_up.weight").double()
        scale = weights.pop(f"{key}.alpha").item() / down.shape[0]
        delta = scale * (up.flatten(1) @ down.flatten(1))
        weight = module.weight.double()
        if module.__class__.__name__ == "Conv1D":
            delta = delta.T
        changed = weight + delta.reshape(weight.shape)
        if f"{key}.dora_scale" in weights:
            magnitude = weights.pop(f"{key}.dora_scale").double()
            norm = changed.flatten(1).norm(dim=1)
            changed = changed * (magnitude.flatten() / norm).reshape(-1, *[1] * (weight.dim() - 1))
        module.weight.data = changed.float()
    assert not weights, f"no module took {sorted(weights)}"


@pytest.mark.parametrize(
    "name", ["plain", "rslora_patterns", "dora", "conv", "conv_dora", "conv1d_storage"]
)
def test_sd_scripts_rules_give_what_peft_gives(name, case_of, tmp_path) -> None:
    case = case_of(name)
    write_adapter(read_adapter(case.made.path), tmp_path / "x.safetensors", "kohya", base=case.base)
    model = case.made.fresh_base()
    before = model(inputs())
    _apply_as_sd_scripts_does(model, tmp_path / "x.safetensors")
    got, expected = (
        model(inputs()),
        load_with_peft(case.made.fresh_base(), case.made.path)(inputs()),
    )
    if not isinstance(got, torch.Tensor):
        before, got, expected = before.logits, got.logits, expected.logits
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert (got - before).abs().max() > 0.01


def _foreign(file, *names: str, rank: int = 2, alpha: float | None = 1.0) -> None:
    torch.manual_seed(0)
    tensors = {}
    for name in names:
        tensors[f"{name}.lora_down.weight"] = torch.randn(rank, 6)
        tensors[f"{name}.lora_up.weight"] = torch.randn(4, rank)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)


def test_names_come_from_the_base(case_of, tmp_path) -> None:
    file = tmp_path / "x.safetensors"
    name = "lora_te1_model_layers_0_self_attn_q_proj"
    _foreign(file, name)
    with pytest.raises(LoraportError, match="to tell dots from underscores, got none; give --base"):
        read_adapter(file)
    back = read_adapter(file, base=case_of("plain").base)
    assert list(back.modules) == ["model.layers.0.self_attn.q_proj"]
    assert back.modules["model.layers.0.self_attn.q_proj"].scaling == 0.5
    _foreign(file, name, alpha=None)
    back = read_adapter(file, base=case_of("plain").base)
    assert back.modules["model.layers.0.self_attn.q_proj"].scaling == 1.0
    _foreign(file, "lora_unet_nowhere")
    with pytest.raises(LoraportError, match="lora_unet_nowhere: expected one module of the base"):
        read_adapter(file, base=case_of("plain").base)


def test_ambiguous_names_are_refused_both_ways(tmp_path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text('{"_class_name": "UNet2DConditionModel"}')
    weights = {"a.b_c.weight": torch.zeros(4, 6), "a_b.c.weight": torch.zeros(4, 6)}
    save_file(weights, base / "diffusion_pytorch_model.safetensors")
    _foreign(tmp_path / "x.safetensors", "lora_unet_a_b_c")
    with pytest.raises(LoraportError, match=r"got several: a\.b_c, a_b\.c"):
        read_adapter(tmp_path / "x.safetensors", base=str(base))
    module = LoraModule(ModuleKind.LINEAR, torch.ones(2, 6), torch.ones(4, 2), alpha=2)
    adapter = Adapter({"a.b_c": module, "a_b.c": module})
    with pytest.raises(LoraportError, match=r"a\.b_c, a_b\.c: expected names that differ in more"):
        write_adapter(adapter, tmp_path / "y.safetensors", "kohya")


def test_a_pipeline_has_several_components(tmp_path) -> None:
    module = LoraModule(ModuleKind.LINEAR, torch.ones(2, 6), torch.ones(4, 2), alpha=3)
    paths = ["unet.mid.to_q", "text_encoder.text_model.fc1", "text_encoder_2.text_model.fc1"]
    adapter = Adapter(dict.fromkeys(paths, module))
    write_adapter(adapter, tmp_path / "x.safetensors", "kohya")
    assert {name.partition(".")[0] for name in load_file(tmp_path / "x.safetensors")} == {
        "lora_unet_mid_to_q",
        "lora_te1_text_model_fc1",
        "lora_te2_text_model_fc1",
    }
    assert set(read_adapter(tmp_path / "x.safetensors").modules) == set(paths)


def test_foreign_kinds_are_refused_by_name(case_of, tmp_path) -> None:
    save_file({"lora_unet_x.hada_w1_a": torch.ones(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(LoraportError, match="expected one of the known formats"):
        read_adapter(tmp_path / "x.safetensors")
    tensors = {
        "lora_unet_x.lora_down.weight": torch.ones(2, 6),
        "lora_unet_x.lora_up.weight": torch.ones(4, 2),
        "lora_unet_x.lora_mid.weight": torch.ones(2, 2),
        "lora_unet_x.dora_scale": torch.ones(1, 6),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(LoraportError, match="lora_mid") as refused:
        read_adapter(tmp_path / "x.safetensors", base=case_of("plain").base)
    assert "lora_unet_x.lora_mid.weight" in str(refused.value)
