"""diffusers' files in diffusers itself, on a tiny UNet; sd-scripts' files too."""

import warnings

import pytest
import torch
from peft_cases import Case, make_case
from safetensors.torch import load_file, save_file

from converters.formats.registry import read_adapter, write_adapter
from loraport.adapter import Adapter, LoraModule, ModuleKind
from loraport.errors import LoraportError

_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.2", "conv1", "proj_in"]


def _unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()


def _output(unet: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    context = torch.randn(1, 5, 24, generator=generator)
    with torch.no_grad():
        return unet(sample, torch.tensor(3), context).sample


_CASES = [
    ("diffusers", {"alpha_pattern": {"to_v": 3}, "rank_pattern": {"to_k": 2}}),
    ("diffusers", {"use_dora": True, "use_rslora": True}),
    # One alpha: diffusers 0.42 drops those of sd-scripts' files that differ on attention.
    ("kohya", {"rank_pattern": {"to_k": 2}}),
]


@pytest.mark.parametrize(("format_name", "options"), _CASES)
def test_diffusers_computes_what_peft_computes(format_name, options, tmp_path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers import StableDiffusionPipeline

    case = Case(_unet, {"target_modules": _TARGETS, "r": 4, "lora_alpha": 10, **options})
    made = make_case(case, tmp_path / "adapter", base=_unet())
    write_adapter(read_adapter(made.path), tmp_path / "x.safetensors", format_name)
    unet = _unet()
    bare = _output(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(
            str(tmp_path / "x.safetensors"), unet_config=unet.config, return_lora_metadata=True
        )
        StableDiffusionPipeline.load_lora_into_unet(state, alphas, unet, metadata=metadata)
    expected = _output(made.peft_model.base_model.model)
    torch.testing.assert_close(_output(unet), expected, rtol=1e-5, atol=1e-5)
    assert (expected - bare).abs().max() > 0.1


def test_files_without_a_configuration_have_alpha_equal_to_rank(case_of, tmp_path) -> None:
    adapter = read_adapter(case_of("patterns").made.path)
    write_adapter(adapter, tmp_path / "x", "diffusers")
    file = tmp_path / "x" / "pytorch_lora_weights.safetensors"
    save_file(load_file(file), file)
    back = read_adapter(file)
    assert {path: module.rank for path, module in back.modules.items()} == {
        path: module.rank for path, module in adapter.modules.items()
    }
    assert {module.scaling for module in back.modules.values()} == {1.0}


def test_a_pipeline_has_several_components(tmp_path) -> None:
    modules = {
        path: LoraModule(ModuleKind.LINEAR, torch.randn(2, 4), torch.randn(3, 2), alpha=alpha)
        for alpha, path in enumerate(("unet.a.to_q", "text_encoder.a.to_q", "text_encoder_2.fc"), 1)
    }
    write_adapter(Adapter(modules), tmp_path / "x", "diffusers")
    names = load_file(tmp_path / "x" / "pytorch_lora_weights.safetensors")
    assert {name.partition(".")[0] for name in names} == {path.split(".")[0] for path in modules}
    back = read_adapter(tmp_path / "x")
    assert {path: m.scaling for path, m in back.modules.items()} == {
        path: module.scaling for path, module in modules.items()
    }
    assert all(torch.equal(back.modules[path].lora_B, modules[path].lora_B) for path in modules)
    save_file({**names, "vae.a.lora_A.weight": torch.ones(2, 4)}, tmp_path / "y.safetensors")
    with pytest.raises(LoraportError, match=r"expected keys of .*unet.*, got vae\.a\.lora_A"):
        read_adapter(tmp_path / "y.safetensors")
