"""sd-scripts' files for SDXL and Flux, whose modules have their authors' names, not diffusers'."""

import itertools
import json
import re
import warnings

import pytest
import torch
from click.testing import CliRunner
from peft_cases import Case, load_with_peft, make_case
from safetensors.torch import load_file, save_file

from converters.formats.registry import read_adapter, write_adapter
from loraport.cli import cli
from loraport.errors import LoraportError
from loraport.naming.original_diffusion import unet_name

_SKIP = {"reason": "diffusers is not installed"}


def sdxl_unet():
    """A UNet with SDXL's blocks, tiny."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(16, 32, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(2, 4, 4),
        cross_attention_dim=24,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=20,
        norm_num_groups=8,
    ).eval()


def output(unet):
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, 4, 8, 8, generator=generator)
    context = torch.randn(1, 5, 24, generator=generator)
    added = {
        "text_embeds": torch.randn(1, 12, generator=generator),
        "time_ids": torch.tensor([[1.0, 2.0]]),
    }
    with torch.no_grad():
        return unet(sample, torch.tensor(3), context, added_cond_kwargs=added).sample


def original_names():
    """Every name the original UNet may have for a module, by diffusers' name of it."""
    inside = [
        *("in_layers_2", "out_layers_3", "emb_layers_1", "skip_connection", "op", "conv"),
        *("proj_in", "proj_out"),
    ]
    blocks = ("attn1", "attn2")
    parts = [f"{a}_{p}" for a in blocks for p in ("to_q", "to_k", "to_v", "to_out_0")]
    parts += ["ff_net_0_proj", "ff_net_2"]
    inside += [f"transformer_blocks_{n}_{part}" for n in range(2) for part in parts]
    names = [f"middle_block_{i}_{rest}" for i in range(3) for rest in inside]
    for side, i, j in itertools.product(("input", "output"), range(9), range(3)):
        names += [f"{side}_blocks_{i}_{j}_{rest}" for rest in inside]
    names += ["time_embed_0", "time_embed_2", "label_emb_0_0", "label_emb_0_2", "out_2"]
    names += ["input_blocks_0_0"]
    return {unet_name(name, 2): name for name in names}


def as_sd_scripts_saves(adapter, file):
    """Write an adapter of diffusers' UNet under the original names."""
    original, tensors = original_names(), {}
    for path, module in adapter.modules.items():
        name = f"lora_unet_{original[path.replace('.', '_')]}"
        tensors[f"{name}.lora_down.weight"] = module.lora_A
        tensors[f"{name}.lora_up.weight"] = module.lora_B
        tensors[f"{name}.alpha"] = torch.tensor(module.alpha)
    save_file(tensors, file)


@pytest.fixture(scope="module")
def sdxl(tmp_path_factory):
    """The UNet, and an adapter of many of its modules in sd-scripts' file."""
    pytest.importorskip("diffusers", **_SKIP)
    directory = tmp_path_factory.mktemp("sdxl")
    targets = r".*(to_q|to_out\.0|ff\.net\.2|conv1|conv2|conv_shortcut|time_emb_proj|proj_in)"
    targets += r"|.*samplers\.0\.conv|conv_in|conv_out|(time|add)_embedding\.linear_[12]"
    case = Case(sdxl_unet, {"target_modules": targets, "r": 3, "lora_alpha": 6})
    made = make_case(case, directory / "adapter", base=sdxl_unet())
    made.base.save_pretrained(directory / "unet")
    as_sd_scripts_saves(read_adapter(made.path), directory / "x.safetensors")
    return made, directory


def test_sdxl_as_diffusers_reads_it(sdxl, tmp_path) -> None:
    from diffusers import StableDiffusionXLPipeline

    made, directory = sdxl
    file = directory / "x.safetensors"
    back = read_adapter(file, base=str(directory / "unet"))
    trained = read_adapter(made.path)
    assert back.modules.keys() == trained.modules.keys()
    write_adapter(back, tmp_path / "peft", "peft")
    ours = output(load_with_peft(made.fresh_base(), tmp_path / "peft").base_model.model)
    unet = sdxl_unet()
    bare = output(unet)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, alphas = StableDiffusionXLPipeline.lora_state_dict(
            str(directory), weight_name="x.safetensors", unet_config=unet.config
        )
        StableDiffusionXLPipeline.load_lora_into_unet(state, alphas, unet)
    torch.testing.assert_close(ours, output(unet), rtol=1e-4, atol=1e-5)
    assert (ours - bare).abs().max() > 0.01


def test_sdxl_merged_into_diffusers_own_directory(sdxl, tmp_path) -> None:
    from diffusers import UNet2DConditionModel

    made, directory = sdxl
    for shards in (False, True):
        base = directory / "unet"
        if shards:
            base = tmp_path / "sharded"
            made.base.save_pretrained(base, max_shard_size="200KB")
            assert len(list(base.glob("*.safetensors"))) > 1
        out = tmp_path / f"merged-{shards}"
        command = ["merge", str(base), str(directory / "x.safetensors"), "-o", str(out)]
        result = CliRunner().invoke(cli, command)
        assert result.exit_code == 0, result.exception
        merged = UNet2DConditionModel.from_pretrained(out).eval()
        expected = output(made.peft_model.base_model.model)
        torch.testing.assert_close(output(merged), expected, rtol=1e-4, atol=1e-5)


def test_sdxl_is_inspected_with_its_base(sdxl) -> None:
    made, directory = sdxl
    command = ["inspect", str(directory / "x.safetensors"), "--json"]
    bare = CliRunner().invoke(cli, command)
    assert isinstance(bare.exception, LoraportError)
    assert "got none; give --base" in str(bare.exception)
    result = CliRunner().invoke(cli, [*command, "--base", str(directory / "unet")])
    assert result.exit_code == 0, result.exception
    rows = json.loads(result.stdout)["rows"]
    trained = read_adapter(made.path).modules
    assert {row["module"]: row["scaling"] for row in rows} == {
        path: f"{module.scaling:g}" for path, module in trained.items()
    }


def test_sdxl_names_as_sd_scripts_lists_them() -> None:
    expected = {
        "input_blocks_3_0_op": "down_blocks_0_downsamplers_0_conv",
        "input_blocks_4_0_skip_connection": "down_blocks_1_resnets_0_conv_shortcut",
        "input_blocks_8_1_proj_in": "down_blocks_2_attentions_1_proj_in",
        "middle_block_1_transformer_blocks_9_ff_net_0_proj": (
            "mid_block_attentions_0_transformer_blocks_9_ff_net_0_proj"
        ),
        "middle_block_2_in_layers_2": "mid_block_resnets_1_conv1",
        "output_blocks_5_2_conv": "up_blocks_1_upsamplers_0_conv",
        "output_blocks_8_0_emb_layers_1": "up_blocks_2_resnets_2_time_emb_proj",
        "label_emb_0_2": "add_embedding_linear_2",
        "down_blocks_0_resnets_0_conv1": None,
        "output_blocks_1_2_proj_in": None,
        "input_blocks_4_0_unheard_of": None,
    }
    assert {name: unet_name(name, 2) for name in expected} == expected


def flux_base(path, width=3072):
    """The names and numbers of rows of Flux's first blocks, one column wide."""
    path.mkdir(parents=True)
    (path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    block = {
        **dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0"), width),
        **dict.fromkeys((f"attn.add_{part}_proj" for part in "qkv"), width),
        "attn.to_add_out": width,
        "ff.net.0.proj": 4 * width,
        "ff.net.2": width,
        "ff_context.net.0.proj": 4 * width,
        "ff_context.net.2": width,
        "norm1.linear": 6 * width,
        "norm1_context.linear": 6 * width,
    }
    single = {
        **dict.fromkeys(("attn.to_q", "attn.to_k", "attn.to_v", "proj_out"), width),
        "proj_mlp": 4 * width,
        "norm.linear": 3 * width,
    }
    rows = {f"transformer_blocks.0.{name}": count for name, count in block.items()}
    rows |= {f"single_transformer_blocks.1.{name}": count for name, count in single.items()}
    rows |= {"x_embedder": width, "norm_out.linear": 2 * width, "proj_out": 64}
    weights = {f"{name}.weight": torch.zeros(count, 1).half() for name, count in rows.items()}
    save_file(weights, path / "diffusion_pytorch_model.safetensors")
    return path


_FLUX = {
    "double_blocks_0_img_attn_qkv": 3,
    "double_blocks_0_txt_attn_qkv": 3,
    "double_blocks_0_img_attn_proj": 1,
    "double_blocks_0_txt_mlp_0": 4,
    "double_blocks_0_img_mod_lin": 6,
    "single_blocks_1_linear1": 7,
    "single_blocks_1_linear2": 1,
    "single_blocks_1_modulation_lin": 3,
    "img_in": 1,
    "final_layer_adaLN_modulation_1": 2,
}


def flux_file(file, width=3072):
    torch.manual_seed(0)
    tensors = {}
    for name, rows in _FLUX.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(2, 5)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(rows * width, 2)
        # diffusers 0.42 leaves the last layer's alpha out; with the rank it says nothing.
        alpha = 2.0 if name.startswith("final") else 1.0
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    save_file(tensors, file)
    return tensors


def test_flux_as_diffusers_reads_it(tmp_path) -> None:
    pytest.importorskip("diffusers", **_SKIP)
    from diffusers.loaders.lora_conversion_utils import _convert_kohya_flux_lora_to_diffusers

    base = flux_base(tmp_path / "transformer")
    tensors = flux_file(tmp_path / "x.safetensors")
    back = read_adapter(tmp_path / "x.safetensors", base=str(base))
    expected = _convert_kohya_flux_lora_to_diffusers(dict(tensors))
    paths = {name.removeprefix("transformer.").split(".lora_")[0] for name in expected}
    assert set(back.modules) == paths
    by_path = {name.removeprefix("transformer."): tensor for name, tensor in expected.items()}
    for path, module in back.modules.items():
        wanted = by_path[f"{path}.lora_B.weight"] @ by_path[f"{path}.lora_A.weight"]
        got = module.scaling * module.lora_B @ module.lora_A
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_flux_by_its_definition(tmp_path) -> None:
    """What is fused in the original is rows of one matrix; scale and shift change places."""
    base = flux_base(tmp_path / "transformer", 4)
    tensors = flux_file(tmp_path / "x.safetensors", 4)
    back = read_adapter(tmp_path / "x.safetensors", base=str(base))
    up = tensors["lora_unet_single_blocks_1_linear1.lora_up.weight"]
    block = "single_transformer_blocks.1"
    parts = [back.modules[f"{block}.{name}"] for name in ("attn.to_q", "attn.to_k", "attn.to_v")]
    assert torch.equal(torch.cat([part.lora_B for part in parts]), up[:12])
    assert torch.equal(back.modules[f"{block}.proj_mlp"].lora_B, up[12:])
    assert {part.scaling for part in parts} == {0.5}
    up = tensors["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    assert torch.equal(back.modules["norm_out.linear"].lora_B, torch.cat([up[4:], up[:4]]))
    with pytest.raises(LoraportError, match="choose --to diffusers"):
        write_adapter(back, tmp_path / "y.safetensors", "kohya")
    write_adapter(back, tmp_path / "y", "diffusers")
    assert read_adapter(tmp_path / "y").modules.keys() == back.modules.keys()
    names = load_file(tmp_path / "y" / "pytorch_lora_weights.safetensors")
    assert all(name.startswith("transformer.") for name in names)


def test_what_is_not_certain_is_refused(tmp_path) -> None:
    tensors = flux_file(tmp_path / "x.safetensors", 4)
    with pytest.raises(LoraportError, match="to tell dots from underscores, got none; give --base"):
        read_adapter(tmp_path / "x.safetensors")
    other = flux_base(tmp_path / "other", 5)
    with pytest.raises(LoraportError, match=r"linear1\.lora_up.*expected 35 rows, got \[28, 2\]"):
        read_adapter(tmp_path / "x.safetensors", base=str(other))
    base = flux_base(tmp_path / "transformer", 4)
    name = "lora_unet_double_blocks_0_img_attn_norm"
    tensors |= {f"{name}.lora_down.weight": torch.ones(2, 5)}
    tensors |= {f"{name}.lora_up.weight": torch.ones(4, 2)}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(LoraportError, match=f"{name}: expected one module of the base"):
        read_adapter(tmp_path / "x.safetensors", base=str(base))


def test_a_pipeline_s_components(tmp_path) -> None:
    """Text encoders beside the transformer, each name looked up in its own component."""
    pipeline = tmp_path / "pipeline"
    flux_base(pipeline / "transformer", 4)
    (pipeline / "model_index.json").write_text("{}")
    for component in ("text_encoder", "text_encoder_2"):
        (pipeline / component).mkdir()
        (pipeline / component / "config.json").write_text(json.dumps({"model_type": "clip"}))
        weight = {"text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(6, 3)}
        save_file(weight, pipeline / component / "model.safetensors")
    tensors = flux_file(tmp_path / "x.safetensors", 4)
    for te in ("te1", "te2"):
        name = f"lora_{te}_text_model_encoder_layers_0_mlp_fc1"
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, 3)
        tensors[f"{name}.lora_up.weight"] = torch.randn(6, 2)
    save_file(tensors, tmp_path / "x.safetensors")
    back = read_adapter(tmp_path / "x.safetensors", base=str(pipeline))
    heads = {path.partition(".")[0] for path in back.modules}
    assert heads == {"transformer", "text_encoder", "text_encoder_2"}
    write_adapter(back, tmp_path / "y", "diffusers")
    again = read_adapter(tmp_path / "y")
    assert again.modules.keys() == back.modules.keys()
    for path, module in back.modules.items():
        assert torch.equal(again.modules[path].lora_B, module.lora_B)
        assert again.modules[path].scaling == module.scaling


def comfy_name(name):
    """What ComfyUI's files call a module that sd-scripts has another name for."""
    path = name.removeprefix("lora_unet_")
    for words in ("double_blocks", "single_blocks", "img_attn", "txt_attn", "img_mlp", "img_mod"):
        path = path.replace(f"{words}_", f"{words}.")
    path = re.sub(r"(blocks\.\d+)_", r"\1.", path)
    path = path.replace("modulation_lin", "modulation.lin").replace("layer_adaLN", "layer.adaLN")
    return f"diffusion_model.{re.sub(r'modulation_1$', 'modulation.1', path)}"


@pytest.mark.parametrize("ends", [("lora_down", "lora_up"), ("lora_A", "lora_B")])
@pytest.mark.parametrize("alphas", [False, True])
def test_flux_in_comfyui_s_file_is_what_it_is_in_sd_scripts_s(ends, alphas, tmp_path) -> None:
    base = flux_base(tmp_path / "transformer", 4)
    named = {
        name: tensor
        for name, tensor in flux_file(tmp_path / "x.safetensors", 4).items()
        if alphas or not name.endswith("alpha")
    }
    save_file(named, tmp_path / "x.safetensors")
    comfy = {}
    for name, tensor in named.items():
        module, _, end = name.partition(".")
        end = end.replace("lora_down", ends[0]).replace("lora_up", ends[1])
        comfy[f"{comfy_name(module)}.{end}"] = tensor
    assert f"diffusion_model.final_layer.adaLN_modulation.1.{ends[0]}.weight" in comfy
    save_file(comfy, tmp_path / "y.safetensors")
    expected = read_adapter(tmp_path / "x.safetensors", base=str(base)).modules
    got = read_adapter(tmp_path / "y.safetensors", base=str(base)).modules
    assert got.keys() == expected.keys()
    for path, module in got.items():
        assert torch.equal(module.lora_A, expected[path].lora_A)
        assert torch.equal(module.lora_B, expected[path].lora_B)
        assert module.scaling == expected[path].scaling == (0.5 if alphas else 1.0) or (
            path == "norm_out.linear"  # its alpha is its rank
        )
    other = flux_base(tmp_path / "other", 5)
    with pytest.raises(LoraportError, match=r"linear1: expected lora_B of 35 rows, got \[28, 2\]"):
        read_adapter(tmp_path / "y.safetensors", base=str(other))


def test_comfyui_s_file_without_a_base_has_the_published_names(tmp_path) -> None:
    """Merged into the published weights, in float64; diffusers' layout asks for its base."""
    torch.manual_seed(0)
    path = "double_blocks.0.img_attn.qkv"
    a, b, weight = torch.randn(2, 5), torch.randn(12, 2), torch.randn(12, 5)
    ends = {"lora_down.weight": a, "lora_up.weight": b, "alpha": torch.tensor(3.0)}
    save_file(
        {f"diffusion_model.{path}.{end}": tensor for end, tensor in ends.items()},
        tmp_path / "x.safetensors",
    )
    save_file({f"{path}.weight": weight, "other": weight + 1}, tmp_path / "flux.safetensors")
    command = ["merge", str(tmp_path / "flux.safetensors"), str(tmp_path / "x.safetensors"), "-o"]
    result = CliRunner().invoke(cli, [*command, str(tmp_path / "merged")])
    assert result.exit_code == 0, result.exception
    merged = load_file(next((tmp_path / "merged").glob("*.safetensors")))
    expected = weight.double() + 3 / 2 * b.double() @ a.double()
    torch.testing.assert_close(merged[f"{path}.weight"], expected.float(), rtol=0, atol=1e-6)
    assert torch.equal(merged["other"], weight + 1)
    adapter = read_adapter(tmp_path / "x.safetensors")
    with pytest.raises(LoraportError, match=r"got one of Flux as it was published; give --base"):
        write_adapter(adapter, tmp_path / "y", "diffusers")
