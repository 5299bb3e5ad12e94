"""Weights of 8 bits with scales, in three formats: dequantized, merged, written as floats."""

import json

import pytest
import torch
from merge_bases import load_merged, write_adapter
from peft_cases import TINY, Case, load_with_peft, logits, make_case
from safetensors.torch import load_file, save_file

from converters.merge import MergeOptions, make_plan
from converters.merge.opening import open_base
from converters.merge.sources import open_files
from loraport.errors import LoraportError

FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 5]}


def codes(*shape, dtype=torch.float8_e4m3fn):
    generator = torch.Generator().manual_seed(0)
    if dtype == torch.int8:
        return torch.randint(-128, 128, shape, generator=generator).to(dtype)
    return torch.randn(*shape, generator=generator).mul(40).to(dtype)


def random_scales(*shape, dtype=torch.float32):
    return (torch.rand(*shape, generator=torch.Generator().manual_seed(1)) + 0.01).to(dtype)


def exact(quantized, scales, block):
    """Multiply slowly, element by element; scales ``[matrices, down, across]``."""
    matrices = quantized.double().reshape(-1, *quantized.shape[-2:])
    scales = scales.double().reshape(matrices.shape[0], *scales.shape[-2:])
    result = torch.zeros_like(matrices)
    for matrix, row, column in torch.cartesian_prod(*map(torch.arange, matrices.shape)):
        scale = scales[matrix, row // block[0], column // block[1]]
        result[matrix, row, column] = matrices[matrix, row, column] * scale
    return result.reshape(quantized.shape)


def write(path, stored, settings, config=None):
    path.mkdir()
    save_file(stored, path / "model.safetensors", {"format": "pt"})
    content = {"quantization_config": settings, **(config or {})}
    (path / "config.json").write_text(json.dumps(content))


def check(path, stored, settings, wanted):
    """Read every stretch of ``fc.weight``, and nothing but it."""
    write(path, stored, settings)
    sources = open_base(str(path)).sources()
    assert sources.keys() == {"fc.weight"}
    source, numbers = sources["fc.weight"], wanted.numel()
    assert (source.shape, source.dtype) == (tuple(wanted.shape), "BF16")
    with open_files() as files:
        for start in range(0, numbers, 29):
            for count in (1, 7, 61, numbers - start):
                got = source.read(files, start, min(count, numbers - start)).double()
                part = wanted.flatten()[start : start + count]
                # One product in float32, with a scale that may be a product itself.
                assert ((got - part).abs() <= part.abs() * 2.0**-22).all()


BLOCKS = {  # shape of the weight, of its scales, and blocks
    "even": ((16, 20), (2, 4), [8, 5]),
    "cut_short": ((19, 23), (3, 5), [8, 5]),
    "larger_than_the_weight": ((19, 23), (1, 1), [128, 128]),
    "experts": ((3, 10, 12), (3, 2, 3), [8, 5]),
    "one_for_each_expert": ((3, 10, 12), (3, 1, 1), None),
}


@pytest.mark.parametrize("name", sorted(BLOCKS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fp8_blocks(name, dtype, tmp_path):
    shape, grid, block = BLOCKS[name]
    stored = {"fc.weight": codes(*shape), "fc.weight_scale_inv": random_scales(*grid, dtype=dtype)}
    wanted = exact(*stored.values(), block or shape[-2:])
    stored["fc.activation_scale"] = torch.ones(())
    check(tmp_path / "base", stored, FP8 | {"weight_block_size": block}, wanted)
    if name == "cut_short":  # the control: blocks of equal size, as near as they come
        assert not torch.allclose(exact(*list(stored.values())[:2], (7, 5)), wanted)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("block", [None, [8, 5]])
def test_one_fp8_scale(shape, block, tmp_path):
    weight, scale = codes(3, 9, 7, dtype=torch.float8_e5m2), torch.full(shape, 0.3)
    stored = {"fc.weight": weight, "fc.weight_scale_inv": scale}
    wanted = weight.double() * torch.tensor(0.3).double()
    check(tmp_path / "base", stored, FP8 | {"weight_block_size": block}, wanted)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_scales_that_are_powers_of_two(dtype, tmp_path):
    exponents = torch.tensor([[120, 127], [129, 100]], dtype=torch.uint8)
    stored = {"fc.weight": codes(16, 10), "fc.weight_scale_inv": exponents.view(dtype)}
    wanted = exact(codes(16, 10), 2.0 ** (exponents.double() - 127), (8, 5))
    check(tmp_path / "base", stored, FP8 | {"scale_fmt": "ue8m0"}, wanted)
    assert not torch.allclose(exact(codes(16, 10), exponents, (8, 5)), wanted)


def weights(strategy, **more):
    return {"group_0": {"weights": {"num_bits": 8, "strategy": strategy, **more}}}


def compressed(strategy, **more):
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": weights(strategy, **more),
    }


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize(
    ("settings", "grid", "block"),
    [
        (compressed("tensor"), (1,), None),
        (compressed("channel"), (9, 1), (1, 12)),
        (compressed("group", group_size=4), (9, 3), (1, 4)),
        (compressed("block", block_structure=[8, 5]), (2, 3), (8, 5)),
    ],
    ids=["tensor", "channel", "group", "block"],
)
def test_compressed_tensors(dtype, settings, grid, block, tmp_path):
    weight, scales = codes(9, 12, dtype=dtype), random_scales(*grid, dtype=torch.bfloat16)
    wanted = exact(weight, scales.reshape(1, 1) if block is None else scales, block or (9, 12))
    stored = {"fc.weight": weight, "fc.weight_scale": scales}
    stored |= {"fc.input_scale": torch.ones(1), "self_attn.k_scale": torch.ones(1)}
    check(tmp_path / "base", stored, settings, wanted)


def test_int8_of_bitsandbytes(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional")
    weight, largest = codes(9, 12, dtype=torch.int8), random_scales(9)
    stored = {
        "fc.weight": weight,
        "fc.SCB": largest,
        "fc.weight_format": torch.zeros((), dtype=torch.uint8),
    }
    wanted = exact(weight, largest[:, None] / 127, (1, 12))
    settings = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    check(tmp_path / "base", stored, settings, wanted)
    theirs = functional.int8_vectorwise_dequant(weight, largest)
    assert torch.allclose(theirs.double(), wanted, rtol=1e-6)
    stored["fc.weight_format"] = torch.ones((), dtype=torch.uint8)
    write(tmp_path / "turned", stored, settings)
    with pytest.raises(LoraportError, match=r"fc\.weight: expected a whole 8-bit weight .* row by"):
        open_base(str(tmp_path / "turned"))


def deepseek():
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    ranks = {"q_lora_rank": 16, "kv_lora_rank": 16}
    heads = {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    return DeepseekV3ForCausalLM(
        DeepseekV3Config(
            **TINY, **ranks, **heads, **experts, num_attention_heads=4, num_key_value_heads=4,
            first_k_dense_replace=1, moe_intermediate_size=24, dtype="float32",
        )
    )  # fmt: skip


def test_a_deepseek_is_merged_as_peft_computes(tmp_path, merge_into):
    """All linear layers but the head and the router, experts one by one, in fp8."""
    torch.manual_seed(0)
    model = deepseek()
    model.save_pretrained(tmp_path / "float")
    stored = load_file(tmp_path / "float/model.safetensors")
    assert any("experts.3.up_proj" in name for name in stored)
    for name in [name for name in stored if name.endswith("proj.weight") or "_mqa" in name]:
        weight = stored[name]
        scales = torch.ones(weight.shape[0] // 8, weight.shape[1] // 8)
        scales = scales / 200 + random_scales(*scales.shape) / 100
        wide = scales.repeat_interleave(8, 0).repeat_interleave(8, 1)
        stored[name] = (weight / wide).to(torch.float8_e4m3fn)
        stored[name + "_scale_inv"] = scales
    config = json.loads((tmp_path / "float/config.json").read_text())
    write(tmp_path / "base", stored, FP8 | {"weight_block_size": [8, 8]}, config)
    from loraport.base.loading import load_model

    base = load_model(str(tmp_path / "base"))
    assert all(parameter.dtype == torch.float32 for parameter in base.parameters())
    options = {
        "target_modules": ["q_a_proj", "kv_b_proj", "o_proj", "shared_experts.down_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    }
    made = make_case(Case(deepseek, options), tmp_path / "adapter", base=base)
    plan = merge_into(tmp_path / "base", tmp_path / "merged", made.path)
    assert "quantized (fp8); the output is its dequantized weights" in plan.notes[0]
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert merged.keys() == load_file(tmp_path / "float/model.safetensors").keys()
    assert {tensor.dtype for tensor in merged.values()} == {torch.float32}
    expected = logits(load_with_peft(made.fresh_base(), made.path))
    got = logits(load_merged(made, tmp_path / "merged"))
    assert torch.allclose(got, expected, rtol=0, atol=1e-5 * expected.abs().max())
    assert (got - logits(made.base)).abs().max() > 0.1
    assert (logits(made.base) - logits(model)).abs().max() > 1e-3  # the control: it was rounded


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        (FP8, {"fc.weight_scale_inv": None}, "expected its scales fc.weight_scale_inv, got none"),
        (FP8, {"fc.weight": None}, "expected the weight fc.weight that it scales, got none"),
        (FP8, {"fc.weight": codes(16, 10).float()}, r"matrix of F8_E4M3 or F8_E5M2, got F32"),
        (FP8, {"fc.weight": codes(16)}, r"expected a matrix of .*, got F8_E4M3 \[16\]"),
        (FP8, {"fc.weight_scale_inv": random_scales(2, 3)}, r"\[2, 2\] for blocks of 8 x 5, got"),
        (FP8, {"fc.weight_scale_inv": random_scales(2)}, r"\[2, 2\] for blocks .*, got \[2\]"),
        (FP8, {"fc.weight_scale_inv": torch.ones(2, 2).long()}, "expected scales of F32, .* I64"),
        (FP8 | {"weight_block_size": [0, 8]}, {}, r"two positive integers, got \[0, 8\]"),
        (FP8 | {"weight_block_size": 128}, {}, r"two positive integers, got 128"),
        (compressed("channel"), {}, r"fc\.weight: expected its scales fc\.weight_scale, got none"),
        (
            compressed("channel"),
            {"fc.weight_scale": random_scales(16, 2)},
            r"\[16, 1\] for blocks of 1 x 10, got \[16, 2\]",
        ),
        (
            compressed("channel"),
            {"fc.weight_zero_point": torch.zeros(16, 1)},
            r"fc\.weight_zero_point: expected weights of codes and scales alone",
        ),
        (compressed("channel") | {"transform_config": {"a": 1}}, {}, "got rotated ones"),
        (
            compressed("group") | {"format": "pack-quantized"},
            {},
            "by 'compressed-tensors' as 'pack-quantized'; merge into the float model",
        ),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(settings, change, message, tmp_path):
    stored = {"fc.weight": codes(16, 10), "fc.weight_scale_inv": random_scales(2, 2), **change}
    write(tmp_path / "base", {n: t for n, t in stored.items() if t is not None}, settings)
    with pytest.raises(LoraportError, match=message):
        open_base(str(tmp_path / "base"))


@pytest.mark.parametrize("kept", [(), ("config.json",)])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
def test_codes_whose_config_is_lost_are_refused_with_what_to_do(kept, dtype, tmp_path):
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    whole = {"fc.weight": codes(4, 6, dtype=dtype), "fc.weight_scale": random_scales(1)}
    write(base, whole, compressed("tensor"))
    write_adapter(adapter)
    options = MergeOptions(base=str(base), adapters=((adapter, 1.0),))
    assert [each.name for each in make_plan(options).tensors if each.changed] == ["fc.weight"]
    (base / "config.json").unlink()
    for name in kept:
        (base / name).write_text("{}")
    with pytest.raises(LoraportError) as error:
        make_plan(options)
    stored = {torch.float8_e4m3fn: "F8_E4M3", torch.int8: "I8"}[dtype]
    assert str(error.value).splitlines()[1:] == [
        f"  - {adapter}: fc.weight: expected a float tensor in the base, got fc.weight stored as "
        f"{stored}, of which no config.json tells; give the directory with the config.json that "
        "it was saved with, or merge into the float model it was made from"
    ]
