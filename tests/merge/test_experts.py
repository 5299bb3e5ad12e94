"""Mixtures of experts: adapters and bases that store the experts one by one, or all as one."""

import json
import warnings
from dataclasses import replace

import pytest
import torch
from merge_bases import load_merged, save_base
from peft_cases import TINY, Case, Made, load_with_peft, logits, make_case, mixtral, qwen_moe
from safetensors.torch import load_file, save_file

from converters.merge import MergeOptions, make_plan
from loraport.errors import LoraportError

# Model → the module of its experts in older files, and what an expert's matrices are called.
_OLDER = {
    "mixtral": (mixtral, "block_sparse_moe.experts", ("w1", "w3", "w2")),
    "qwen_moe": (qwen_moe, "mlp.experts", ("gate_proj", "up_proj", "down_proj")),
}
_EXPERTS, _INNER = 4, {"mixtral": TINY["intermediate_size"], "qwen_moe": 20}


def make_older(name, path, leaves=None, **config):
    """Make the adapter that PEFT saved when each expert was a module of linear layers."""
    model_of, module, (gate, up, down) = _OLDER[name]
    leaves = leaves or (gate, up, down)
    inner, hidden, rank = _INNER[name], TINY["hidden_size"], config.get("r", 3)
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in range(2):
        for expert in range(_EXPERTS):
            for leaf in leaves:
                out, features = (hidden, inner) if leaf == down else (inner, hidden)
                key = f"base_model.model.model.layers.{layer}.{module}.{expert}.{leaf}.lora_"
                own = config.get("rank_pattern", {}).get(leaf, rank)
                tensors[f"{key}A.weight"] = torch.randn(own, features, generator=generator)
                tensors[f"{key}B.weight"] = torch.randn(out, own, generator=generator)
                if config.get("use_dora"):
                    vector = torch.rand(out, generator=generator) + 0.5
                    tensors[f"{key}magnitude_vector"] = vector
    path.mkdir()
    content = {"peft_type": "LORA", "r": rank, "lora_alpha": 5, "target_modules": list(leaves)}
    (path / "adapter_config.json").write_text(json.dumps({**content, **config}))
    save_file(tensors, path / "adapter_model.safetensors")
    torch.manual_seed(0)
    return Made(Case(model_of), model_of().eval(), None, path)


def save_both(made, tmp_path):
    """Save the base with its experts one by one, and with all of them as one tensor."""
    save_base(made.base, tmp_path / "split")
    save_base(made.base, tmp_path / "fused", save_original_format=False)
    names = [set(load_file(tmp_path / kind / "model.safetensors")) for kind in ("split", "fused")]
    assert not any(name.endswith(("gate_up_proj", "experts.down_proj")) for name in names[0])
    assert any(name.endswith("experts.gate_up_proj") for name in names[1])


@pytest.mark.parametrize("name", sorted(_OLDER))
def test_adapters_of_single_experts(name, tmp_path, merge_into):
    """PEFT itself turns such an adapter into one for fused experts when it loads it."""
    made = make_older(name, tmp_path / "adapter")
    save_both(made, tmp_path)
    expected = logits(load_with_peft(made.fresh_base(), made.path))
    scale = expected.abs().max().item()
    for kind in ("split", "fused"):
        merge_into(tmp_path / kind, tmp_path / f"{kind}-merged", made.path)
        before = load_file(tmp_path / kind / "model.safetensors")
        assert load_file(tmp_path / f"{kind}-merged/model.safetensors").keys() == before.keys()
        got = logits(load_merged(made, tmp_path / f"{kind}-merged"))
        assert torch.allclose(got, expected, rtol=0, atol=1e-5 * scale)
        assert (got - logits(made.base)).abs().max() > 0.1


def exact(weight, tensors, key, scaling):
    """Return the merged matrix in float64, by the formulas."""
    a, b = (tensors[f"{key}.lora_{part}.weight"].double() for part in "AB")
    merged = weight.double() + scaling * b @ a
    magnitude = tensors.get(f"{key}.lora_magnitude_vector")
    if magnitude is not None:
        merged = merged * (magnitude.double() / merged.norm(dim=1))[:, None]
    return merged


@pytest.mark.parametrize("name", sorted(_OLDER))
@pytest.mark.parametrize(
    "config",
    [
        {"use_rslora": True},  # PEFT 0.21 scales these by the root of 2 too much
        {"use_dora": True},
        {"rank_pattern": {"w3": 2, "up_proj": 2}, "alpha_pattern": {"w1": 2, "down_proj": 9}},
        {"leaves": 0},  # the gate alone, which PEFT refuses
    ],
    ids=["rslora", "dora", "patterns", "one"],
)
def test_single_experts_are_exact_where_peft_is_not(name, config, tmp_path, merge_into):
    _, module, all_leaves = _OLDER[name]
    leaves = all_leaves[:1] if "leaves" in config else all_leaves
    config = {key: value for key, value in config.items() if key != "leaves"}
    made = make_older(name, tmp_path / "adapter", leaves, **config)
    save_both(made, tmp_path)
    tensors = load_file(made.path / "adapter_model.safetensors")
    for kind in ("split", "fused"):
        merge_into(tmp_path / kind, tmp_path / f"{kind}-merged", made.path)
    split = load_file(tmp_path / "split-merged" / "model.safetensors")
    before = load_file(tmp_path / "split" / "model.safetensors")
    fused = load_file(tmp_path / "fused-merged" / "model.safetensors")
    for layer in range(2):
        stacked = {leaf: [] for leaf in all_leaves}
        for expert in range(_EXPERTS):
            for leaf in all_leaves:
                path = f"model.layers.{layer}.{module}.{expert}.{leaf}"
                weight = split[f"{path}.weight"]
                stacked[leaf].append(weight)
                if leaf not in leaves:
                    assert torch.equal(weight, before[f"{path}.weight"])
                    continue
                alpha = config.get("alpha_pattern", {}).get(leaf, 5)
                rank = config.get("rank_pattern", {}).get(leaf, 3)
                scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
                key = f"base_model.model.{path}"
                wanted = exact(before[f"{path}.weight"], tensors, key, scaling)
                # Half a unit in the last place, and the float64 reference's own rounding.
                bound = wanted.abs() * 2.0**-24 + 1e-12
                assert ((weight.double() - wanted).abs() <= bound).all()
                assert (weight - before[f"{path}.weight"]).abs().max() > 0.1
        gate, up, down = (torch.stack(stacked[leaf]) for leaf in all_leaves)
        both = torch.cat([gate, up], dim=1)
        assert torch.equal(fused[f"model.layers.{layer}.mlp.experts.gate_up_proj"], both)
        assert torch.equal(fused[f"model.layers.{layer}.mlp.experts.down_proj"], down)


_FUSED = {
    "target_modules": ["q_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    "r": 3,
}


@pytest.mark.parametrize("model_of", [mixtral, qwen_moe])
@pytest.mark.parametrize(
    "options", [_FUSED, {"target_modules": ["v_proj"], "modules_to_save": ["experts"]}]
)
def test_adapters_of_fused_experts(model_of, options, tmp_path, merge_into):
    made = make_case(Case(model_of, options), tmp_path / "adapter")
    save_both(made, tmp_path)
    expected = logits(load_with_peft(made.fresh_base(), made.path))
    for kind in ("split", "fused"):
        merge_into(tmp_path / kind, tmp_path / f"{kind}-merged", made.path)
        got = logits(load_merged(made, tmp_path / f"{kind}-merged"))
        assert torch.allclose(got, expected, rtol=0, atol=1e-5 * expected.abs().max())
        assert (got - logits(made.base)).abs().max() > 0.1


def test_replaced_experts_by_strength(tmp_path, merge_into):
    """Half-way between the base's experts and the adapter's, in both layouts alike."""
    options = {"target_modules": ["v_proj"], "modules_to_save": ["experts"]}
    made = make_case(Case(mixtral, options), tmp_path / "adapter")
    save_both(made, tmp_path)
    for kind in ("split", "fused"):
        merge_into(tmp_path / kind, tmp_path / f"{kind}-merged", (made.path, 0.5))
    saved = load_file(made.path / "adapter_model.safetensors")
    name = "model.layers.1.mlp.experts.down_proj"
    base = load_file(tmp_path / "fused/model.safetensors")[name]
    wanted = (base.double() + saved[f"base_model.model.{name}"].double()) / 2
    fused = load_file(tmp_path / "fused-merged/model.safetensors")[name]
    assert ((fused.double() - wanted).abs() <= wanted.abs() * 2.0**-24 + 1e-30).all()
    split = load_file(tmp_path / "split-merged/model.safetensors")
    for expert in range(_EXPERTS):
        part = split[f"model.layers.1.block_sparse_moe.experts.{expert}.w2.weight"]
        assert torch.equal(part, fused[expert])


def square_mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {**TINY, "intermediate_size": TINY["hidden_size"]}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return MixtralForCausalLM(MixtralConfig(**sizes, **heads, num_local_experts=4))


def square_gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    sizes = {**TINY, "intermediate_size": TINY["hidden_size"], "head_dim": 8}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return GptOssForCausalLM(
        GptOssConfig(**sizes, **heads, num_local_experts=4, num_experts_per_tok=2)
    )


@pytest.mark.parametrize("model_of", [square_mixtral, square_gpt_oss])
def test_square_experts_lie_as_the_model_says(model_of, tmp_path, merge_into):
    """GPT-OSS stores each expert ``[in, out]``; in a square one no shape tells."""
    options = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]}
    made = make_case(Case(model_of, options), tmp_path / "adapter")
    save_base(made.base, tmp_path / "base", save_original_format=False)
    merge_into(tmp_path / "base", tmp_path / "merged", made.path)
    expected = logits(load_with_peft(made.fresh_base(), made.path))
    got = logits(load_merged(made, tmp_path / "merged"))
    assert torch.allclose(got, expected, rtol=0, atol=1e-5 * expected.abs().max())
    # The control: the other way round is another model.
    tensors = load_file(tmp_path / "merged/model.safetensors")
    base = load_file(tmp_path / "base/model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith("experts.down_proj"):
            tensors[name] = base[name] + (tensor - base[name]).transpose(1, 2)
    save_file(tensors, tmp_path / "merged/model.safetensors", {"format": "pt"})
    turned = logits(load_merged(made, tmp_path / "merged"))
    assert (turned - expected).abs().max() > 0.01
    # A model that nobody knows leaves it open.
    (tmp_path / "base" / "config.json").unlink()
    with pytest.raises(LoraportError, match="square experts, which may be stored either way"):
        make_plan(MergeOptions(base=str(tmp_path / "base"), adapters=((made.path, 1.0),)))


def test_experts_that_do_not_fit_are_named(tmp_path):
    made = make_older("mixtral", tmp_path / "adapter", r=2)
    save_both(made, tmp_path)
    file = made.path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.0.block_sparse_moe.experts.{}.w1.lora_{}.weight"
    beyond = {key.format(9, part): tensors[key.format(3, part)].clone() for part in "AB"}
    narrow = {key.format(2, "A"): torch.ones(2, 31)}

    def refusal(base, content):
        save_file(content, file)
        with pytest.raises(LoraportError) as error:
            make_plan(MergeOptions(base=str(tmp_path / base), adapters=((made.path, 1.0),)))
        return str(error.value)

    assert "experts.9.w1.weight: expected" in refusal("fused", {**tensors, **beyond})
    assert "an expert below 4, got 9" in refusal("fused", {**tensors, **beyond})
    assert "experts.9.w1.weight: expected" in refusal("split", {**tensors, **beyond})
    assert "expected experts of 2 x [48, 31]" in refusal("fused", {**tensors, **narrow})
    assert "expected [48, 31]" in refusal("split", {**tensors, **narrow})
    # Names of the experts' own files without a model that fuses them: they are plain tensors.
    save_file(tensors, file)
    (tmp_path / "split" / "config.json").unlink()
    assert make_plan(MergeOptions(base=str(tmp_path / "split"), adapters=((made.path, 1.0),)))
    (tmp_path / "fused" / "config.json").unlink()
    assert "use the base the adapter was trained on" in refusal("fused", tensors)


def test_both_kinds_of_adapters_add_up(tmp_path, merge_into):
    older = make_older("mixtral", tmp_path / "older")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fused = make_case(Case(mixtral, _FUSED), tmp_path / "new", base=older.base)
    save_both(replace(older, base=fused.base), tmp_path)
    pairs = ((older.path, 0.5), (fused.path, -2.0))
    for kind in ("split", "fused"):
        merge_into(tmp_path / kind, tmp_path / f"{kind}-merged", *pairs)
        merge_into(tmp_path / kind, tmp_path / f"{kind}-1", (older.path, 0.5))
        merge_into(tmp_path / kind, tmp_path / f"{kind}-2", (fused.path, -2.0))
        names = (kind, f"{kind}-merged", f"{kind}-1", f"{kind}-2")
        base, both, one, two = (load_file(tmp_path / each / "model.safetensors") for each in names)
        for name, tensor in both.items():
            wanted = one[name].double() + two[name].double() - base[name].double()
            assert torch.allclose(tensor.double(), wanted, rtol=0, atol=2e-5), name
