"""Experts in MXFP4: dequantized, merged, written as floats."""

import json
import math

import pytest
import torch
from merge_bases import load_merged
from peft_cases import TINY, Case, load_with_peft, logits, make_case
from safetensors.torch import load_file, save_file

from converters.merge.opening import open_base
from converters.merge.sources import open_files
from loraport.errors import LoraportError

E2M1 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


def parts(experts, out, groups, scales=(90, 150)):
    """Return random blocks and scales, as gpt-oss stores them."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (experts, out, groups, 16), generator=generator)
    powers = torch.randint(*scales, (experts, out, groups), generator=generator)
    return blocks.to(torch.uint8), powers.to(torch.uint8)


def exact(blocks, scales, *, low_first=True):
    """Dequantize slowly, number by number, as the specification says: ``[experts, in, out]``."""
    experts, out, groups, _ = blocks.shape
    result = torch.zeros(experts, 32 * groups, out, dtype=torch.float64)
    for expert, row, group in torch.cartesian_prod(*map(torch.arange, (experts, out, groups))):
        power = 2.0 ** (int(scales[expert, row, group]) - 127)
        for place, byte in enumerate(blocks[expert, row, group].tolist()):
            halves = (byte & 15, byte >> 4) if low_first else (byte >> 4, byte & 15)
            for half, code in enumerate(halves):
                number = E2M1[code & 7] * (-1 if code & 8 else 1)
                result[expert, 32 * group + 2 * place + half, row] = number * power
    return result


def write(path, stored, config=None):
    path.mkdir()
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    settings = {"quantization_config": {"quant_method": "mxfp4"}, **(config or {})}
    (path / "config.json").write_text(json.dumps(settings))


def test_any_stretch_is_what_the_specification_says(tmp_path):
    blocks, scales = parts(2, 5, 3)
    scales[0, 0, :2] = torch.tensor([0, 254])  # the smallest and the largest
    blocks[0, 0, 1] = 17  # which float32 can hold in small numbers only
    write(tmp_path / "base", {"mlp.x_blocks": blocks, "mlp.x_scales": scales})
    sources = open_base(str(tmp_path / "base")).sources()
    source, wanted = sources["mlp.x"], exact(blocks, scales)
    assert sources.keys() == {"mlp.x"}
    assert (source.shape, source.dtype) == ((2, 96, 5), "BF16")
    numbers = wanted.numel()
    with open_files() as files:
        assert torch.equal(source.read(files, 0, numbers).double().reshape(wanted.shape), wanted)
        for start in range(0, numbers, 37):
            for count in (1, 5, 163, numbers - start):
                got = source.read(files, start, min(count, numbers - start)).double()
                assert torch.equal(got, wanted.flatten()[start : start + count])
    assert not torch.equal(exact(blocks, scales, low_first=False), wanted)


def test_as_transformers_dequantizes(tmp_path):
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks, scales = parts(3, 10, 2)
    write(tmp_path / "base", {"x_blocks": blocks, "x_scales": scales})
    source = open_base(str(tmp_path / "base")).sources()["x"]
    with open_files() as files:
        got = source.read(files, 0, math.prod(source.shape)).reshape(source.shape)
    assert torch.equal(got, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))


def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    return GptOssForCausalLM(
        GptOssConfig(
            **{**TINY, "intermediate_size": 64},
            **heads,
            num_local_experts=4,
            num_experts_per_tok=2,
            dtype="float32",
        )
    )


def test_a_gpt_oss_is_merged_as_peft_computes(tmp_path, merge_into):
    torch.manual_seed(0)
    stored = {name: tensor.contiguous() for name, tensor in gpt_oss().state_dict().items()}
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, features, out = stored.pop(name).shape
        blocks, scales = parts(experts, out, features // 32, (122, 126))
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    config = gpt_oss().config.to_dict() | {"architectures": ["GptOssForCausalLM"]}
    write(tmp_path / "base", stored, config | {"quantization_config": {"quant_method": "mxfp4"}})
    from loraport.base.loading import load_model

    base = load_model(str(tmp_path / "base"))
    options = {
        "target_modules": ["q_proj", "o_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    made = make_case(Case(gpt_oss, options), tmp_path / "adapter", base=base)
    plan = merge_into(tmp_path / "base", tmp_path / "merged", made.path)
    assert "quantized (mxfp4); the output is its dequantized weights" in plan.notes[0]
    assert "quantization_config" not in json.loads((tmp_path / "merged/config.json").read_text())
    expected = logits(load_with_peft(made.fresh_base(), made.path))
    got = logits(load_merged(made, tmp_path / "merged"))
    assert torch.allclose(got, expected, rtol=0, atol=1e-5 * expected.abs().max())
    assert (got - logits(made.base)).abs().max() > 0.1
    # One expert in float64, by the formulas.
    name = "model.layers.1.mlp.experts.down_proj"
    tensors = load_file(made.path / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{name.rpartition('.')[0]}.lora_{x}.weight"] for x in "AB")
    a, b = a.double().view(4, 8, -1), b.double().view(b.shape[0], 8, 4)
    wanted = exact(stored[f"{name}_blocks"], stored[f"{name}_scales"])
    wanted += torch.einsum("eri,ore->eio", a, b)  # alpha is the rank: scaling 1
    merged = load_file(tmp_path / "merged/model.safetensors")[name].double()
    assert ((merged - wanted).abs() <= wanted.abs() * 2.0**-24 + 1e-12).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_scales": None}, "x: expected whole experts in MXFP4, got no scales"),
        ({"x_blocks": None}, "x_scales: expected the blocks that it scales, got none"),
        ({"x": torch.ones(2)}, "got a tensor of this name as well"),
        ({"x_scales": torch.zeros(2, 5, 4, dtype=torch.uint8)}, r"scales U8 \[2, 5, 4\], where U8"),
        ({"x_scales": torch.zeros(2, 5, 3, dtype=torch.int8)}, r"scales I8 \[2, 5, 3\], where U8"),
        ({"x_blocks": torch.zeros(2, 5, 3, 8, dtype=torch.uint8)}, r"blocks U8 \[2, 5, 3, 8\]"),
        ({"x_blocks": torch.zeros(5, 3, 16, dtype=torch.uint8)}, r"blocks U8 \[5, 3, 16\]"),
    ],
)
def test_parts_that_do_not_fit_are_named(change, message, tmp_path):
    blocks, scales = parts(2, 5, 3)
    stored = {"x_blocks": blocks, "x_scales": scales, **change}
    write(tmp_path / "base", {name: t for name, t in stored.items() if t is not None})
    with pytest.raises(LoraportError, match=message):
        open_base(str(tmp_path / "base"))
