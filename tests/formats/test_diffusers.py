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


# What older versions called A and B of a module; the last is a UNet's own file.
_OLDER = {
    "lora": lambda path: f"unet.{path}.lora.{{}}.weight",
    "linear_layer": lambda path: f"unet.{path}.lora_linear_layer.{{}}.weight",
    "processor": lambda path: "unet." + _of_processor(path),
    "unet": lambda path: _of_processor(path),
}


def _of_processor(path: str) -> str:
    block, _, module = path.removesuffix(".0").rpartition(".")
    return f"{block}.processor.{module}_lora.{{}}.weight"


@pytest.mark.parametrize("names", _OLDER)
def test_older_names_as_diffusers_reads_them(names, tmp_path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    options = {"target_modules": ["to_q", "to_k", "to_v", "to_out.0"], "r": 4, "lora_alpha": 4}
    made = make_case(Case(_unet, options), tmp_path / "adapter", base=_unet())
    trained = read_adapter(made.path)
    tensors = {}
    for path, module in trained.modules.items():
        tensors[_OLDER[names](path).format("down")] = module.lora_A
        tensors[_OLDER[names](path).format("up")] = module.lora_B
    save_file(tensors, tmp_path / "x.safetensors")
    back = read_adapter(tmp_path / "x.safetensors")
    assert back.modules.keys() == trained.modules.keys()
    for path, module in back.modules.items():
        assert torch.equal(module.lora_A, trained.modules[path].lora_A)
        assert torch.equal(module.lora_B, trained.modules[path].lora_B)
        assert module.scaling == 1.0
    if names == "linear_layer":  # diffusers takes it in text encoders alone
        return
    unet = _unet()
    bare = _output(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prefix = None if names == "unet" else "unet"
        unet.load_lora_adapter(load_file(tmp_path / "x.safetensors"), prefix=prefix)
    expected = _output(made.peft_model.base_model.model)
    torch.testing.assert_close(_output(unet), expected, rtol=1e-5, atol=1e-5)
    assert (expected - bare).abs().max() > 0.1


def test_text_encoders_of_the_oldest_files_have_names_of_a_unet(tmp_path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers.utils.state_dict_utils import convert_state_dict_to_peft

    block = "text_encoder.text_model.encoder.layers.0.self_attn"
    tensors = {}
    for module in ("q", "k", "v", "out"):
        tensors[f"{block}.to_{module}_lora.down.weight"] = torch.randn(2, 4)
        tensors[f"{block}.to_{module}_lora.up.weight"] = torch.randn(3, 2)
    save_file(tensors, tmp_path / "x.safetensors")
    expected = convert_state_dict_to_peft(dict(tensors))
    back = read_adapter(tmp_path / "x.safetensors")
    assert len(back.modules) == 4
    for path, module in back.modules.items():
        assert torch.equal(module.lora_A, expected[f"text_encoder.{path}.lora_A.weight"])
        assert torch.equal(module.lora_B, expected[f"text_encoder.{path}.lora_B.weight"])


@pytest.mark.parametrize("parts", [("lora_A", "lora_B"), ("lora_down", "lora_up")])
def test_alphas_beside_the_matrices_scale_as_in_diffusers(parts, tmp_path) -> None:
    pytest.importorskip("diffusers", reason="diffusers is not installed")
    from diffusers import FluxPipeline, FluxTransformer2DModel

    attention = "transformer_blocks.0.attn"
    tensors = {}
    for module, rank, alpha in (("to_q", 2, 5.0), ("to_k", 4, 1.0), ("to_v", 3, 3.0)):
        for part, shape in zip(("lora_A", "lora_B"), ((rank, 16), (16, rank)), strict=True):
            tensors[f"transformer.{attention}.{module}.{part}.weight"] = torch.randn(shape)
        tensors[f"transformer.{attention}.{module}.alpha"] = torch.tensor(alpha)
    renamed = {
        name.replace("lora_A", parts[0]).replace("lora_B", parts[1]): tensor
        for name, tensor in tensors.items()
    }
    save_file(renamed, tmp_path / "x.safetensors")
    save_file(tensors, tmp_path / "reference.safetensors")
    transformer = FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=0,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=12,
        pooled_projection_dim=6,
        axes_dims_rope=(2, 2, 4),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, alphas = FluxPipeline.lora_state_dict(
            str(tmp_path / "reference.safetensors"), return_alphas=True
        )
        FluxPipeline.load_lora_into_transformer(state, alphas, transformer)
    back = read_adapter(tmp_path / "x.safetensors")
    assert not back.replacements
    scalings = {}
    for path, module in back.modules.items():
        layer = transformer.get_submodule(path)
        scalings[path] = module.scaling
        assert module.scaling == float(layer.scaling["default_0"])
        assert torch.equal(module.lora_B, layer.lora_B["default_0"].weight)
    assert scalings == {
        f"{attention}.to_q": 2.5,
        f"{attention}.to_k": 0.25,
        f"{attention}.to_v": 1.0,
    }


def test_what_is_no_part_of_a_module_is_refused(tmp_path) -> None:
    path = "transformer.a.to_q"
    pair = {f"{path}.lora_A.weight": torch.ones(2, 4), f"{path}.lora_B.weight": torch.ones(3, 2)}
    faults = {
        f"{path}.diff": (torch.ones(3, 4), f"{path}.diff: expected lora_A, lora_B, alpha"),
        f"{path}.alpha": (torch.ones(2), r"\.alpha: expected one finite number, not 0, got \[1"),
        "transformer.b.alpha": (torch.tensor(1.0), r"b\.alpha: expected lora_A and lora_B beside"),
    }
    for name, (tensor, message) in faults.items():
        save_file({**pair, name: tensor}, tmp_path / "x.safetensors")
        with pytest.raises(LoraportError, match=message):
            read_adapter(tmp_path / "x.safetensors")
    alpha = {f"{path}.alpha": torch.tensor(4.0)}
    other = {name.replace("to_q", "to_k"): tensor.clone() for name, tensor in pair.items()}
    save_file({**pair, **other, **alpha}, tmp_path / "x.safetensors")
    with pytest.raises(LoraportError, match=r"to_k\.lora_A\.weight: expected an alpha beside it"):
        read_adapter(tmp_path / "x.safetensors")  # diffusers takes the commonest, others the rank
    metadata = {"lora_adapter_metadata": '{"transformer.r": 2, "transformer.lora_alpha": 4}'}
    save_file({**pair, **alpha}, tmp_path / "x.safetensors", metadata)
    with pytest.raises(LoraportError, match=r"alpha: expected one place for alpha"):
        read_adapter(tmp_path / "x.safetensors")
    # A trained norm beside LoRA, as control adapters have it, is one.
    norm = {"transformer.norm.weight": torch.ones(3)}
    save_file({**pair, **norm}, tmp_path / "x.safetensors")
    assert set(read_adapter(tmp_path / "x.safetensors").replacements) == {"norm.weight"}


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
