"""A fine-tune becomes an adapter: exact at full rank, the best there is below."""

import copy
import json
import re
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from merge_bases import save_base
from peft_cases import (
    TINY,
    ConvNet,
    NormNet,
    bert,
    gpt2,
    llama,
    load_with_peft,
    logits,
    mixtral,
    qwen_moe,
    t5,
)
from safetensors.torch import load_file, save_file

from converters.extract import ExtractOptions, extract
from loraport.base.stored_tensors import stored_tensors
from loraport.cli import cli
from loraport.errors import LoraportError
from loraport.peft_layout import read_peft, write_peft
from loraport.training import load_into


def tune(base, rank=3, seed=0):
    """Change every weight by a matrix of rank ``rank`` and every vector freely."""
    torch.manual_seed(seed)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in tuned.parameters():
            if parameter.dim() < 2:
                parameter.add_(torch.randn_like(parameter) * 0.1)
                continue
            flat = parameter.flatten(1)
            b, a = torch.randn(len(flat), rank), torch.randn(rank, flat.shape[1])
            parameter.add_((b @ a).reshape(parameter.shape) * 0.05)
    return tuned


def extracted_from_tuned(make_model, tmp_path):
    """Return a base, its fine-tune of rank 3 and what is extracted; both are saved there."""
    torch.manual_seed(0)
    base = make_model().eval()
    tuned = tune(base)
    save_base(base, tmp_path / "base")
    save_base(tuned, tmp_path / "tuned")
    options = ExtractOptions(str(tmp_path / "base"), str(tmp_path / "tuned"), rank=3)
    extracted = extract(options, lambda *_: None)
    return base, tuned, extracted


@pytest.mark.parametrize("make_model", [llama, gpt2, bert, ConvNet])
def test_low_rank_fine_tune_is_found_again(make_model, tmp_path):
    base, tuned, extracted = extracted_from_tuned(make_model, tmp_path)
    if make_model is not ConvNet:  # without a configuration nothing tells an embedding apart
        write_peft(extracted.adapter, tmp_path / "adapter")
        got = logits(load_with_peft(copy.deepcopy(base), tmp_path / "adapter"))
        expected = logits(tuned)
        assert torch.allclose(got, expected, rtol=0, atol=1e-4 * expected.abs().max())
    # The difference was computed in float32: that is the noise below the three values.
    assert max(extracted.errors.values()) < 1e-4
    # Merged, it is the fine-tune to a rounding.
    write_peft(extracted.adapter, tmp_path / "again", force=True)
    run = CliRunner().invoke(
        cli,
        ["merge", str(tmp_path / "base"), str(tmp_path / "again"), "-o", str(tmp_path / "merged")],
    )
    if make_model is not ConvNet:
        assert run.exit_code == 0, run.exception


@pytest.mark.parametrize("make_model", [lambda: llama(tie=True), gpt2, t5])
def test_a_tied_head_learns_what_its_embedding_learns(make_model, tmp_path):
    """In PEFT, where each has a module of its own, and merged, where both stay one tensor."""
    base, tuned, extracted = extracted_from_tuned(make_model, tmp_path)
    assert extracted.errors.keys() == extracted.adapter.modules.keys()
    write_peft(extracted.adapter, tmp_path / "adapter")
    expected = logits(tuned)
    close = {"rtol": 0, "atol": 1e-4 * expected.abs().max()}
    got = logits(load_with_peft(copy.deepcopy(base), tmp_path / "adapter"))
    assert torch.allclose(got, expected, **close)
    command = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "-o"]
    result = CliRunner().invoke(cli, [*command, str(tmp_path / "merged")])
    assert result.exit_code == 0, result.exception
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    wanted = load_file(tmp_path / "tuned" / "model.safetensors")
    assert merged.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.allclose(merged[name], tensor, rtol=0, atol=1e-5), name
    # The embedding alone, is another model.
    head = {path for path in extracted.adapter.modules if path.endswith("lm_head")}
    assert head
    alone = {p: m for p, m in extracted.adapter.modules.items() if p not in head}
    write_peft(replace(extracted.adapter, modules=alone), tmp_path / "alone")
    other = logits(load_with_peft(copy.deepcopy(base), tmp_path / "alone"))
    assert (other - expected).abs().max() > 100 * close["atol"]


def roberta():
    from transformers import RobertaConfig, RobertaForMaskedLM

    sizes = {**TINY, "num_attention_heads": 4, "max_position_embeddings": 128}
    return RobertaForMaskedLM(RobertaConfig(**sizes, pad_token_id=60))


@pytest.mark.parametrize("stored", ["embedding", "head"])
@pytest.mark.parametrize("make_model", [lambda: llama(tie=True), roberta])
def test_tied_vectors_and_either_way_of_storing_a_tie(make_model, stored, tmp_path):
    """RoBERTa's head has a bias that is tied, too; a checkpoint may store the head's name."""
    torch.manual_seed(0)
    base = make_model().eval()
    tuned = tune(base)
    save_base(base, tmp_path / "base")
    save_base(tuned, tmp_path / "tuned")
    if stored == "head":
        for directory in (tmp_path / "base", tmp_path / "tuned"):
            tensors = load_file(directory / "model.safetensors")
            name = next(each for each in tensors if re.search("(embed_tokens|word_emb)", each))
            head = "lm_head.decoder.weight" if make_model is roberta else "lm_head.weight"
            tensors[head] = tensors.pop(name)
            save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    options = ExtractOptions(str(tmp_path / "base"), str(tmp_path / "tuned"), rank=3)
    write_peft(extract(options, lambda *_: None).adapter, tmp_path / "adapter")
    command = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "-o"]
    result = CliRunner().invoke(cli, [*command, str(tmp_path / "merged")])
    assert result.exit_code == 0, result.exception
    merged = type(base).from_pretrained(tmp_path / "merged").eval()
    expected = logits(tuned)
    assert torch.allclose(logits(merged), expected, rtol=0, atol=1e-4 * expected.abs().max())
    assert (logits(base) - expected).abs().max() > 0.1
    wanted = load_file(tmp_path / "tuned" / "model.safetensors")
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == wanted.keys()


def test_errors_are_reported_and_energy_chooses_ranks(tmp_path):
    torch.manual_seed(0)
    base = llama().eval()
    save_base(base, tmp_path / "base")
    save_base(tune(base, rank=6), tmp_path / "tuned")
    command = ["extract", str(tmp_path / "base"), str(tmp_path / "tuned"), "--json", "-o"]
    result = CliRunner().invoke(cli, [*command, str(tmp_path / "one"), "--rank", "2"])
    document = json.loads(result.stdout)
    adapter = read_peft(tmp_path / "one")
    state = {name: p.detach() for name, p in base.named_parameters()}
    tuned = {name: p.detach() for name, p in tune(base, rank=6).named_parameters()}
    for path, module in adapter.modules.items():
        if "embed" in path:
            continue
        delta = tuned[f"{path}.weight"].double() - state[f"{path}.weight"].double()
        approximation = module.lora_B.double() @ module.lora_A.double() * module.scaling
        actual = float((delta - approximation).norm() / delta.norm())
        singular = torch.linalg.svdvals(delta)
        assert document["modules"][path]["relative_error"] == pytest.approx(actual, rel=1e-5)
        assert actual == pytest.approx(float(singular[2:].norm() / singular.norm()), rel=1e-5)
    assert "model.norm.weight" in document["replaced"]
    CliRunner().invoke(cli, [*command, str(tmp_path / "two"), "--energy", "0.8"])
    ranks = {module.rank for module in read_peft(tmp_path / "two").modules.values()}
    assert ranks <= {2, 3, 4, 5, 6}
    assert CliRunner().invoke(cli, [*command, str(tmp_path / "three")]).exit_code == 2


@pytest.mark.parametrize("make_model", [llama, mixtral])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_fine_tune_in_fewer_bits_is_compared_with_the_base_in_them(dtype, make_model, tmp_path):
    """The rounding is no change: what was trained, is found alone and whole."""
    torch.manual_seed(0)
    base = make_model().eval()
    save_base(base, tmp_path / "base")
    tuned = copy.deepcopy(base).to(dtype)
    changed = [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    deltas = {}
    for path in changed:
        weight = tuned.get_submodule(path).weight.data
        before = weight.double()
        rows, columns = weight.shape
        weight.add_(torch.randn(rows, 2, dtype=dtype) @ torch.randn(2, columns, dtype=dtype))
        deltas[path] = weight.double() - before
    tuned.model.norm.weight.data[3] = 1.5
    save_base(tuned, tmp_path / "tuned")
    options = ExtractOptions(str(tmp_path / "base"), str(tmp_path / "tuned"), energy=1.0)
    extracted = extract(options, lambda *_: None)
    assert sorted(extracted.adapter.modules) == changed
    assert set(extracted.adapter.replacements) == {"model.norm.weight"}
    (note,) = extracted.notes
    assert f"stored in {str(dtype).removeprefix('torch.')}, the base in more" in note
    for path, delta in deltas.items():
        module = extracted.adapter.modules[path]
        got = module.lora_B.double() @ module.lora_A.double() * module.scaling
        assert torch.allclose(got, delta, rtol=0, atol=1e-6 * float(delta.abs().max()))
        noise = base.get_submodule(path).weight.double().to(dtype).double()
        noise -= base.get_submodule(path).weight.double()
        assert noise.abs().max() > 1e-5 * delta.abs().max()  # what was extracted with it before
    # The other way about all bits are there, and nothing is said.
    save_base(copy.deepcopy(tuned).float(), tmp_path / "more")
    options = ExtractOptions(str(tmp_path / "tuned"), str(tmp_path / "more"), rank=1)
    with pytest.raises(LoraportError, match="does not differ"):
        extract(options, lambda *_: None)


def gpt_oss():
    from transformers import GptOssConfig, GptOssForCausalLM

    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return GptOssForCausalLM(GptOssConfig(**TINY, **heads, **experts))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("make_model", [mixtral, qwen_moe, gpt_oss])
def test_experts_are_factored_one_by_one(make_model, fused, tmp_path):
    """Whatever way the two models store them; GPT-OSS has each of them ``[in, out]``.

    PEFT adapts their routers as parameters alone: as a module it takes Mixtral's for the experts.
    """
    torch.manual_seed(0)
    base = make_model().eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if name.endswith((".gate.weight", ".router.weight")):
                change = torch.randn(parameter.shape[0], 3) @ torch.randn(3, parameter.shape[1])
                parameter.add_(change * 0.1)
            if parameter.dim() == 3:
                experts, rows, columns = parameter.shape
                change = torch.randn(experts, rows, 3) @ torch.randn(experts, 3, columns)
                parameter.add_(change * 0.1)
    save_base(base, tmp_path / "base")
    save_base(tuned, tmp_path / "tuned", save_original_format=not fused)
    command = ["extract", str(tmp_path / "base"), str(tmp_path / "tuned"), "--rank", "3", "--json"]
    result = CliRunner().invoke(cli, [*command, "-o", str(tmp_path / "adapter")])
    assert result.exit_code == 0, result.exception
    modules = json.loads(result.stdout)["modules"]
    assert {name.rpartition(".")[2] for name in modules} == {"gate_up_proj", "down_proj", "weight"}
    assert max(each["relative_error"] for each in modules.values()) < 1e-4
    expected = logits(tuned)
    got = logits(load_with_peft(copy.deepcopy(base), tmp_path / "adapter"))
    assert torch.allclose(got, expected, rtol=0, atol=1e-4 * expected.abs().max())
    assert (logits(base) - expected).abs().max() > 0.05
    out = tmp_path / "merged"
    command = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "-o", str(out)]
    assert CliRunner().invoke(cli, command).exit_code == 0
    merged = type(base).from_pretrained(out).eval()
    assert torch.allclose(logits(merged), expected, rtol=0, atol=1e-4 * expected.abs().max())


# What a fine-tune changed, of which PEFT could load nothing: modules of which it saves all
# parameters or none, vectors of modules with others inside, no LoRA at all, routers alone.
CHANGED = {
    "biases": (bert, ("bias",)),
    "norms": (llama, ("norm.weight",)),
    "norms without their biases": (gpt2, ("ln_1.weight", "c_fc.weight")),
    "norms of batches": (NormNet, ("norm.weight", "seen.running_mean", "head.weight")),
    "sinks": (gpt_oss, ("sinks",)),
    "sinks beside projections": (gpt_oss, ("sinks", "q_proj.weight")),
    "biases of experts": (gpt_oss, ("gate_up_proj_bias", "q_proj.weight")),
    "biases beside experts": (gpt_oss, ("gate_up_proj_bias", "down_proj")),
    "routers": (gpt_oss, ("router.weight", "router.bias")),
    "routers beside projections": (mixtral, ("gate.weight", "q_proj.weight")),
}


@pytest.mark.parametrize("name", CHANGED)
def test_peft_loads_what_a_part_of_a_model_learned(name, tmp_path):
    make_model, changed = CHANGED[name]
    torch.manual_seed(0)
    base = make_model().eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter_name, parameter in stored_tensors(tuned).items():
            if not parameter_name.endswith(changed):
                continue
            if parameter.dim() < 2 or parameter_name.endswith("_bias"):
                parameter.add_(torch.randn_like(parameter) * 0.5)
                continue
            *more, rows, columns = parameter.shape
            parameter.add_(torch.randn(*more, rows, 1) @ torch.randn(*more, 1, columns) * 0.1)
    save_base(base, tmp_path / "base")
    save_base(tuned, tmp_path / "tuned")
    options = ExtractOptions(str(tmp_path / "base"), str(tmp_path / "tuned"), rank=1)
    write_peft(extract(options, lambda *_: None).adapter, tmp_path / "adapter")
    expected = logits(tuned)
    scale = expected.abs().max()
    got = logits(load_with_peft(copy.deepcopy(base), tmp_path / "adapter"))
    assert torch.allclose(got, expected, rtol=0, atol=1e-4 * scale)
    assert (logits(base) - expected).abs().max() > 1e-2 * scale
    load_into(base, read_peft(tmp_path / "adapter"))
    assert torch.allclose(logits(base), expected, rtol=0, atol=1e-4 * scale)


def test_experts_with_ranks_of_their_own(tmp_path):
    torch.manual_seed(0)
    base = mixtral().eval()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        weight = tuned.model.layers[0].mlp.experts.down_proj
        weight[2].add_(torch.randn(len(weight[2]), 5) @ torch.randn(5, weight.shape[2]) * 0.1)
    save_base(base, tmp_path / "base")
    save_base(tuned, tmp_path / "tuned")
    options = ExtractOptions(str(tmp_path / "base"), str(tmp_path / "tuned"), energy=0.9999999)
    extracted = extract(options, lambda *_: None)
    ((path, module),) = extracted.adapter.modules.items()
    assert path == "model.layers.0.mlp.experts.down_proj"
    assert module.rank == 5
    a = module.lora_A.reshape(4, 5, -1)
    assert not a[[0, 1, 3]].any()  # nothing changed there
    write_peft(extracted.adapter, tmp_path / "adapter")
    expected = logits(tuned)
    got = logits(load_with_peft(copy.deepcopy(base), tmp_path / "adapter"))
    assert torch.allclose(got, expected, rtol=0, atol=1e-3 * expected.abs().max())


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("more", [3, -4])
def test_another_vocabulary_is_kept_whole(more, tied, tmp_path):
    """Tokens that were added before the fine-tuning, or rows that a base had to spare."""
    torch.manual_seed(0)
    base = llama(tie=tied).eval()
    size = base.config.vocab_size + more
    resized = copy.deepcopy(base)
    resized.resize_token_embeddings(size, mean_resizing=False)
    tuned = tune(resized)
    save_base(base, tmp_path / "base")
    save_base(tuned, tmp_path / "tuned")
    options = ExtractOptions(str(tmp_path / "base"), str(tmp_path / "tuned"), rank=3)
    extracted = extract(options, lambda *_: None)
    (note,) = extracted.notes
    assert "model.embed_tokens.weight stored whole; `loraport merge` resizes the base" in note
    assert f"to {size} rows" in note
    write_peft(extracted.adapter, tmp_path / "adapter")
    expected = logits(tuned)
    got = logits(load_with_peft(resized, tmp_path / "adapter"))
    assert torch.allclose(got, expected, rtol=0, atol=1e-5 * expected.abs().max())
    command = ["merge", str(tmp_path / "base"), str(tmp_path / "adapter"), "-o"]
    assert CliRunner().invoke(cli, [*command, str(tmp_path / "merged")]).exit_code == 0
    merged = type(base).from_pretrained(tmp_path / "merged").eval()
    assert merged.config.vocab_size == size
    assert merged.config.tie_word_embeddings == tied
    assert torch.allclose(logits(merged), expected, rtol=0, atol=1e-5 * expected.abs().max())


@pytest.mark.parametrize(
    ("leaf", "dtype", "told"),
    [
        ("weight", torch.float8_e4m3fn, "F8_E4M3"),
        ("weight", torch.int8, "I8"),
        ("qweight", torch.int32, "I32"),
    ],
)
def test_codes_of_which_no_config_tells_are_refused_in_either_model_or_both(
    leaf, dtype, told, tmp_path
):
    """What else changed would have been an adapter without a word of the weights."""
    model = llama()
    name = "model.layers.0.self_attn.q_proj"
    for directory in ("float", "base", "tuned"):
        save_base(model, tmp_path / directory)
        if directory != "float":
            file = tmp_path / directory / "model.safetensors"
            stored = load_file(file)
            codes = (stored.pop(f"{name}.weight") * 100).to(dtype)
            stored |= {f"{name}.{leaf}": codes, f"{name}.scales": torch.ones(len(codes))}
            save_file(stored, file, {"format": "pt"})
        model.model.norm.weight.data += 1
    for models in (("base", "tuned"), ("float", "tuned"), ("base", "float")):
        base, tuned = (str(tmp_path / each) for each in models)
        with pytest.raises(LoraportError, match="cannot be compared") as refused:
            extract(ExtractOptions(base, tuned, rank=2), lambda *_: None)
        lines = str(refused.value).splitlines()[1:]
        roles = zip(("base", "tuned model"), models, strict=True)
        expected = [role for role, directory in roles if directory != "float"]
        assert len(lines) == len(expected)
        for role, line in zip(expected, lines, strict=True):
            assert line.startswith(
                f"  - {role}: {name}.{leaf}: expected a weight in floating point"
            )
            assert f"got one stored as {told}, of which no config.json tells" in line


def test_what_cannot_be_extracted(tmp_path):
    torch.manual_seed(0)
    save_base(llama(), tmp_path / "base")
    save_base(bert(), tmp_path / "other")

    def run(base, tuned, **options):
        chosen = ExtractOptions(str(tmp_path / base), str(tmp_path / tuned), **options)
        return extract(chosen, lambda *_: None)

    with pytest.raises(LoraportError, match="does not differ"):
        run("base", "base", rank=2)
    with pytest.raises(LoraportError, match="not the same but for their values"):
        run("base", "other", rank=2)
    with pytest.raises(LoraportError, match="--energy"):
        run("base", "base", energy=1.5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize(
    ("make_model", "name"),
    [
        (llama, "model.layers.0.self_attn.q_proj.weight"),
        (llama, "model.norm.weight"),
        (mixtral, "model.layers.0.mlp.experts.down_proj"),
    ],
)
def test_a_model_that_diverged_is_named(make_model, name, value, tmp_path):
    torch.manual_seed(0)
    model = make_model()
    save_base(model, tmp_path / "base")
    with torch.no_grad():
        model.get_parameter(name).flatten()[3] = value
    save_base(model, tmp_path / "tuned")
    options = ExtractOptions(str(tmp_path / "base"), str(tmp_path / "tuned"), rank=2)
    with pytest.raises(LoraportError, match=f"{name}.*: expected finite values in both models"):
        extract(options, lambda *_: None)


def test_a_base_in_as_many_but_other_bits_is_rounded_too_and_that_is_said(tmp_path):
    """float16 has finer steps than bfloat16; tables of integers are as they are."""
    base = llama().eval().half()
    tuned = copy.deepcopy(base).bfloat16()
    path = "model.layers.0.self_attn.q_proj"
    tuned.get_submodule(path).weight.data[:, 0] += 1
    for model, name in ((base, "base"), (tuned, "tuned")):
        save_base(model, tmp_path / name)
        file = tmp_path / name / "model.safetensors"
        numbers = {"model.position_ids": torch.arange(9)}
        save_file(load_file(file) | numbers, file, {"format": "pt"})
    options = ExtractOptions(str(tmp_path / "base"), str(tmp_path / "tuned"), energy=1.0)
    extracted = extract(options, lambda *_: None)
    assert list(extracted.adapter.modules) == [path]
    assert not extracted.adapter.replacements
    assert "stored in bfloat16, the base in more" in extracted.notes[0]


def test_a_quantized_base_is_compared_by_the_weights_it_stands_for(tmp_path):
    """Stored in fp8 with one scale; the fine-tune is a float checkpoint."""
    base = llama().eval()
    name = "model.layers.0.self_attn.q_proj.weight"
    weight = base.get_parameter(name)
    codes, scale = (weight.detach() * 100).to(torch.float8_e4m3fn), torch.tensor(0.01)
    weight.data = codes.float() * scale
    tuned = copy.deepcopy(base)
    change = torch.randn(len(weight), 1) @ torch.randn(1, weight.shape[1])
    tuned.get_parameter(name).data += change
    for model, directory in ((base, "base"), (tuned, "tuned")):
        save_base(model, tmp_path / directory)
    file, config = tmp_path / "base/model.safetensors", tmp_path / "base/config.json"
    stored = load_file(file) | {name: codes, f"{name}_scale_inv": scale}
    save_file(stored, file, {"format": "pt"})
    settings = {"quantization_config": {"quant_method": "fp8", "weight_block_size": None}}
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))

    def run(before, after):
        options = ExtractOptions(str(tmp_path / before), str(tmp_path / after), rank=1)
        return extract(options, lambda *_: None)

    for sign, extracted in ((1, run("base", "tuned")), (-1, run("tuned", "base"))):
        assert list(extracted.adapter.modules) == [name.removesuffix(".weight")]
        module = extracted.adapter.modules[name.removesuffix(".weight")]
        delta = module.lora_B.double() @ module.lora_A.double()
        # The two weights were rounded to float32, and so are the factors.
        assert torch.allclose(delta, sign * change.double(), rtol=0, atol=1e-5)
        side = "base" if sign == 1 else "tuned model"
        assert f"of the {side} (fp8) the dequantized weights are compared" in extracted.notes[0]
    assert "what its quantization rounded counts as changed" in extracted.notes[0]
