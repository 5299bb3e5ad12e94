"""What a merge does to a checkpoint: names, shards, ties, vocabularies, several adapters."""

import json
import warnings

import pytest
import torch
from command_line import command
from merge_bases import load_merged, save_base
from peft_cases import TINY, Case, bert, gpt2, llama, load_with_peft, logits, make_case
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from converters.merge import MergeOptions, make_plan
from loraport.base.checkpoint import Checkpoint
from loraport.errors import LoraportError
from loraport.fingerprint import BaseFingerprint
from loraport.peft_layout import read_peft, write_peft

PLAIN = {"target_modules": ["q_proj", "down_proj"], "r": 4, "lora_alpha": 7}


def raw_tensors(directory):
    """Bytes of every tensor by name, straight from the files."""
    checkpoint = Checkpoint(directory)
    found = {}
    for name in checkpoint:
        info = checkpoint.info(name)
        data = info.file.read_bytes()[info.start : info.start + info.nbytes]
        found[name] = (info.file.name, info.dtype, info.shape, data)
    return found


def test_shards_stay_and_untouched_tensors_keep_every_byte(tmp_path, merge_into):
    made = make_case(Case(llama, PLAIN), tmp_path / "adapter")
    save_base(made.base.to(torch.bfloat16), tmp_path / "base", max_shard_size="15KB")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "base" / "pytorch_model.bin").write_text("the unmerged weights")
    merge_into(tmp_path / "base", tmp_path / "merged", made.path)
    before, after = raw_tensors(tmp_path / "base"), raw_tensors(tmp_path / "merged")
    assert list(before) == list(after)
    assert len({file for file, *_ in before.values()}) > 2
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {f"{path}.weight" for path in read_peft(made.path).modules}
    for name in before:
        assert before[name][:3] == after[name][:3]
    names = {file.name for file in (tmp_path / "merged").iterdir()}
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= names
    assert "pytorch_model.bin" not in names
    with safe_open(next((tmp_path / "merged").glob("*.safetensors")), "pt") as file:
        assert file.metadata() == {"format": "pt"}
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(len(data) for *_, data in after.values())


def test_shards_in_directories_of_their_own(tmp_path, merge_into):
    """transformers reads them, also where two of them have one name."""
    from transformers import AutoModelForCausalLM

    made = make_case(Case(llama, PLAIN), tmp_path / "adapter")
    base = tmp_path / "base"
    save_base(made.base, base, max_shard_size="25KB")
    index = json.loads((base / "model.safetensors.index.json").read_text())
    moved = {}
    for number, file in enumerate(sorted(base.glob("*.safetensors"))):
        (base / "parts" / str(number)).mkdir(parents=True)
        moved[file.name] = f"parts/{number}/weights.safetensors"
        file.rename(base / moved[file.name])
    assert len(moved) > 2
    index["weight_map"] = {name: moved[file] for name, file in index["weight_map"].items()}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    merge_into(base, tmp_path / "merged", made.path)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    expected = made.peft_model.merge_and_unload().state_dict()
    bare = AutoModelForCausalLM.from_pretrained(base).state_dict()
    assert merged.state_dict().keys() == expected.keys()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-6, atol=1e-7)
    changed = {name for name, tensor in bare.items() if not tensor.equal(expected[name])}
    assert changed == {f"{path}.weight" for path in read_peft(made.path).modules}


def test_prefix_of_a_bare_checkpoint(tmp_path, merge_into):
    """GPT-2's own files say ``h.0`` where the module path is ``transformer.h.0``."""
    options = {"target_modules": ["c_attn", "attn.c_proj"], "fan_in_fan_out": True}
    made = make_case(Case(gpt2, options), tmp_path / "adapter")
    save_base(made.base, tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    bare = {name.removeprefix("transformer."): t for name, t in load_file(file).items()}
    save_file(bare, file, {"format": "pt"})
    expected = logits(load_with_peft(made.fresh_base(), made.path))
    for config in (True, False):
        if not config:
            (tmp_path / "base" / "config.json").unlink()  # the names alone must do
        out = tmp_path / f"merged-{config}"
        merge_into(tmp_path / "base", out, made.path)
        assert load_file(out / "model.safetensors").keys() == bare.keys()
        if not config:
            torch.testing.assert_close(
                load_file(out / "model.safetensors"),
                load_file(tmp_path / "merged-True" / "model.safetensors"),
                rtol=0,
                atol=0,
            )
            continue
        assert torch.allclose(logits(load_merged(made, out)), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("lost", ["lm_head.weight", "model.norm.weight", None])
def test_what_the_base_lacks_is_told(lost, tmp_path):
    """The output lacks it as well, and PyTorch would draw it at random; a saved head is there."""
    base, options = tmp_path / "base", {"target_modules": ["q_proj"]}
    made = make_case(Case(llama, options), tmp_path / "a")
    saved = make_case(Case(llama, options | {"modules_to_save": ["lm_head"]}), tmp_path / "saved")
    save_base(made.base, base)
    tensors = load_file(base / "model.safetensors")
    left = {name: tensor for name, tensor in tensors.items() if name != lost}
    save_file(left, base / "model.safetensors", {"format": "pt"})
    told = f"the base's files lack {lost}, and so does the output: transformers draws"
    for path, silent in ((made.path, lost is None), (saved.path, lost != "model.norm.weight")):
        code, said = command("merge", base, path, "-o", tmp_path / "out", "--force")
        assert code == 0, said
        assert (told in said) is not silent
        assert (lost in load_file(tmp_path / "out" / "model.safetensors")) is (
            path == saved.path and lost == "lm_head.weight"
        )


def test_module_paths_of_the_inner_model(tmp_path, merge_into):
    """An adapter trained on ``BertModel`` merges into the classifier's checkpoint."""
    made = make_case(Case(bert, {"target_modules": ["query"]}), tmp_path / "adapter")
    save_base(made.base, tmp_path / "base")
    file = made.path / "adapter_model.safetensors"
    inner = {name.replace("model.bert.", "model."): t for name, t in load_file(file).items()}
    merge_into(tmp_path / "base", tmp_path / "outer", made.path)
    save_file(inner, file)
    merge_into(tmp_path / "base", tmp_path / "inner", made.path)
    assert raw_tensors(tmp_path / "outer") == raw_tensors(tmp_path / "inner")


def test_names_that_fit_nothing_or_several_are_all_listed(tmp_path):
    a, b = torch.ones(2, 6), torch.ones(4, 2)
    base = tmp_path / "base"
    base.mkdir()
    save_file({f"{x}.fc.weight": torch.zeros(4, 6) for x in "ab"}, base / "model.safetensors")
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2}')
    keys = {}
    for path in ("fc", "gone"):
        keys |= {f"base_model.model.{path}.lora_A.weight": a.clone()}
        keys |= {f"base_model.model.{path}.lora_B.weight": b.clone()}
    save_file(keys, adapter / "adapter_model.safetensors")
    with pytest.raises(LoraportError) as error:
        make_plan(MergeOptions(base=str(base), adapters=((adapter, 1.0),)))
    assert "fc.weight: expected one parameter" in str(error.value)
    assert "2 that it may mean: a.fc.weight, b.fc.weight" in str(error.value)
    assert "gone.weight: expected one parameter" in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_adapters_are_their_exact_weighted_sum(dtype, tmp_path, merge_into):
    first = make_case(Case(llama, PLAIN), tmp_path / "a")
    second = make_case(
        Case(llama, {"target_modules": ["q_proj"], "use_dora": True}),
        tmp_path / "b",
        seed=1,
        base=first.base,
    )
    saved = {"target_modules": ["q_proj"], "modules_to_save": ["norm"], "r": 3}
    third = make_case(Case(llama, saved), tmp_path / "c", seed=2, base=first.base)
    save_base(first.fresh_base().to(dtype), tmp_path / "base")
    pairs = ((first.path, 0.5), (second.path, -1.25), (third.path, 2.0))
    merge_into(tmp_path / "base", tmp_path / "merged", *pairs)
    base = load_file(tmp_path / "base" / "model.safetensors")
    got = load_file(tmp_path / "merged" / "model.safetensors")
    for name, stored in base.items():
        exact = stored.double()
        path = name.removesuffix(".weight")
        for adapter_path, strength in pairs:
            adapter = read_peft(adapter_path)
            alone = stored.double()
            if name in adapter.replacements:
                alone = adapter.replacements[name].tensor.double()
            if path in adapter.modules:
                module = adapter.modules[path]
                delta = module.lora_B.double() @ module.lora_A.double() * module.scaling
                alone = alone + delta
                if module.magnitude is not None:
                    norm = alone.norm(dim=1, keepdim=True)
                    alone = alone * module.magnitude.double()[:, None] / norm
            exact = exact + strength * (alone - stored.double())
        if dtype == torch.float32:
            # Rounded once: half a unit in the last place.
            assert ((got[name].double() - exact).abs() <= exact.abs() * 2.0**-24 + 1e-40).all()
        else:
            assert (got[name].double() - exact).abs().max() <= exact.abs().max() * 2.0**-8
        adapters = [read_peft(adapter_path) for adapter_path, _ in pairs]
        touched = any(path in a.modules or name in a.replacements for a in adapters)
        assert touched == (not got[name].equal(stored))


def test_order_and_strength_zero(tmp_path, merge_into):
    first = make_case(Case(llama, PLAIN), tmp_path / "a")
    save_base(first.base, tmp_path / "base")
    merge_into(tmp_path / "base", tmp_path / "zero", (first.path, 0.0))
    merge_into(tmp_path / "base", tmp_path / "none", (first.path, 1.0), (first.path, -1.0))
    base = load_file(tmp_path / "base" / "model.safetensors")
    for other in ("zero", "none"):
        torch.testing.assert_close(
            load_file(tmp_path / other / "model.safetensors"), base, rtol=0, atol=0
        )


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_one_of_a_tied_pair_is_untied(target, tmp_path, merge_into):
    made = make_case(Case(lambda: llama(tie=True), {"target_modules": [target]}), tmp_path / "a")
    save_base(made.base, tmp_path / "base")
    plan = merge_into(tmp_path / "base", tmp_path / "merged", made.path)
    before = load_file(tmp_path / "base" / "model.safetensors")["model.embed_tokens.weight"]
    after = load_file(tmp_path / "merged" / "model.safetensors")
    touched, other = "model.embed_tokens.weight", "lm_head.weight"
    if target == "lm_head":
        touched, other = other, touched
    assert torch.equal(after[other], before)
    assert not torch.equal(after[touched], before)
    assert (
        json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]
        is False
    )
    assert any("untied" in note for note in plan.notes)


def test_a_pair_that_was_tied_in_training_stays_tied(tmp_path, merge_into):
    options = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    made = make_case(Case(lambda: llama(tie=True), options), tmp_path / "a")
    save_base(made.base, tmp_path / "base")
    merge_into(tmp_path / "base", tmp_path / "merged", made.path)
    assert "lm_head.weight" not in Checkpoint(tmp_path / "merged")
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["tie_word_embeddings"]


@pytest.mark.parametrize("tie", [False, True])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_the_copy_beside_an_update_of_a_bare_embedding(tie, strength, tmp_path, merge_into):
    """PEFT saves the embedding and the head beside LoRA on either, ``target_parameters`` too."""
    options = {"target_modules": ["lm_head"], "target_parameters": ["embed_tokens.weight"], "r": 3}
    made = make_case(Case(lambda: llama(tie=tie), options), tmp_path / "a")
    copy = made.path / "adapter_model.safetensors"
    tensors = load_file(copy)
    prefix = "base_model.model.model.embed_tokens"
    # Away from the base's own, so that it shows.
    tensors[f"{prefix}.base_layer.weight"] = tensors[f"{prefix}.base_layer.weight"] + 0.25
    save_file(tensors, copy)
    save_base(made.base, tmp_path / "base")
    merge_into(tmp_path / "base", tmp_path / "merged", (made.path, strength))
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    base = {name: weight.double() for name, weight in made.base.state_dict().items()}
    scaling = 8 / 3
    for name in ("lm_head", "model.embed_tokens"):
        a, b, stored = (
            tensors[f"base_model.model.{name}.{part}.weight"].double()
            for part in ("lora_A", "lora_B", "base_layer")
        )
        weight = base[f"{name}.weight"]
        expected = weight + strength * (stored - weight + scaling * b @ a)
        torch.testing.assert_close(merged[f"{name}.weight"], expected.float(), rtol=0, atol=1e-6)
        assert (expected - weight).abs().max() > 0.1


def roberta():
    from transformers import RobertaConfig, RobertaForMaskedLM

    sizes = {**TINY, "num_attention_heads": 4, "max_position_embeddings": 128}
    return RobertaForMaskedLM(RobertaConfig(**sizes, pad_token_id=60))


def test_untying_one_pair_unties_the_others(tmp_path, merge_into):
    """RoBERTa ties its head's bias by the same flag as the embedding."""
    options = {"target_modules": ["word_embeddings", "query"], "bias": "all", "r": 3}
    made = make_case(Case(roberta, options), tmp_path / "a")
    save_base(made.base, tmp_path / "base")
    assert "lm_head.decoder.bias" not in Checkpoint(tmp_path / "base")
    merge_into(tmp_path / "base", tmp_path / "merged", made.path)
    expected = logits(load_with_peft(made.fresh_base(), made.path))
    got = logits(load_merged(made, tmp_path / "merged"))
    assert torch.allclose(got, expected, rtol=0, atol=1e-5 * expected.abs().max())
    merged = Checkpoint(tmp_path / "merged")
    bias = merged.load("lm_head.decoder.bias")
    assert torch.equal(bias, merged.load("lm_head.bias"))
    assert not torch.equal(bias, made.base.lm_head.bias)


def test_a_module_in_one_adapter_and_its_weight_in_another(tmp_path, merge_into):
    first = make_case(Case(llama, PLAIN), tmp_path / "a")
    bare = {"target_modules": [], "target_parameters": ["q_proj.weight"], "r": 3}
    second = make_case(Case(llama, bare), tmp_path / "b", base=first.base)
    save_base(first.base, tmp_path / "base")
    pairs = ((first.path, 0.5), (second.path, -2.0))
    merge_into(tmp_path / "base", tmp_path / "both", *pairs)
    base = load_file(tmp_path / "base" / "model.safetensors")
    got = load_file(tmp_path / "both" / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    wanted = base[name].double()
    for adapter, path in ((first, name.removesuffix(".weight")), (second, name)):
        module = read_peft(adapter.path).modules[path]
        strength = 0.5 if adapter is first else -2.0
        wanted += strength * module.scaling * module.lora_B.double() @ module.lora_A.double()
    assert ((got[name].double() - wanted).abs() <= wanted.abs() * 2.0**-24 + 1e-12).all()


@pytest.mark.parametrize("tie", [True, False])
def test_resized_vocabulary(tie, tmp_path, merge_into):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = llama(tie=tie).eval()
    save_base(base, tmp_path / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base.resize_token_embeddings(70)
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"]))
        torch.nn.init.normal_(
            model.get_submodule(
                "base_model.model.model.layers.0.self_attn.q_proj.lora_B.default"
            ).weight
        )
        model.save_pretrained(tmp_path / "adapter", save_embedding_layers=True)
    merge_into(tmp_path / "base", tmp_path / "merged", tmp_path / "adapter")
    import transformers

    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert merged.config.vocab_size == 70
    ids = torch.tensor([[1, 69, 65, 3]])
    with torch.no_grad():
        expected, got = model.eval()(input_ids=ids).logits, merged(input_ids=ids).logits
    assert torch.allclose(got, expected, rtol=0, atol=1e-5 * expected.abs().max())


def test_resizing_one_of_two_embeddings_is_refused(tmp_path):
    made = make_case(
        Case(llama, {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}),
        tmp_path / "a",
    )
    save_base(made.base, tmp_path / "base")
    file = made.path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.embed_tokens.weight"
    save_file({**tensors, key: torch.ones(70, 32)}, file)
    with pytest.raises(LoraportError, match=r"lm_head\.weight: expected it resized to 70 rows too"):
        make_plan(MergeOptions(base=str(tmp_path / "base"), adapters=((made.path, 1.0),)))


def test_a_new_head_on_a_base_without_one(tmp_path, merge_into):
    """The usual way of a classifier: the base is the encoder, the adapter brings the head."""
    options = {"target_modules": ["query"], "task_type": "SEQ_CLS"}
    made = make_case(Case(bert, options), tmp_path / "adapter")
    save_base(made.base.bert, tmp_path / "base")
    merge_into(tmp_path / "base", tmp_path / "merged", made.path)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert len(config["id2label"]) == 3
    expected = logits(load_with_peft(made.fresh_base(), made.path))
    assert torch.allclose(logits(load_merged(made, tmp_path / "merged")), expected, atol=1e-5)


def test_lora_bias_without_a_bias_is_refused(tmp_path):
    options = {"target_modules": ["q_proj"], "lora_bias": True}
    made = make_case(Case(llama, options), tmp_path / "a")
    save_base(made.base, tmp_path / "base")
    with pytest.raises(LoraportError, match="has no bias, so `lora_bias` has no place"):
        make_plan(MergeOptions(base=str(tmp_path / "base"), adapters=((made.path, 1.0),)))


def test_another_base_is_refused_unless_forced(tmp_path, merge_into):
    made = make_case(Case(llama, PLAIN), tmp_path / "adapter")
    save_base(made.base, tmp_path / "base")
    adapter = read_peft(made.path)
    from dataclasses import replace

    from loraport.fingerprint import fingerprint

    right = fingerprint(adapter.modules, lambda path: made.base.get_submodule(path).weight)
    path = next(iter(right.modules))
    wrong = BaseFingerprint({**right.modules, path: "0" * 32})
    for name, mark in (("right", right), ("wrong", wrong)):
        write_peft(replace(adapter, base_fingerprint=mark), tmp_path / name)
    merge_into(tmp_path / "base", tmp_path / "one", tmp_path / "right")
    with pytest.raises(LoraportError, match=rf"{path}: .*(?s:.*)--ignore-fingerprint"):
        merge_into(tmp_path / "base", tmp_path / "two", tmp_path / "wrong")
    assert not (tmp_path / "two").exists()
    merge_into(tmp_path / "base", tmp_path / "two", tmp_path / "wrong", ignore_fingerprint=True)
    assert raw_tensors(tmp_path / "one") == raw_tensors(tmp_path / "two")


def test_overflow_is_an_error_not_infinity(tmp_path, merge_into):
    made = make_case(Case(llama, PLAIN), tmp_path / "adapter")
    save_base(made.base.to(torch.float16), tmp_path / "base")
    with pytest.raises(LoraportError, match=r"beyond what F16 holds"):
        merge_into(tmp_path / "base", tmp_path / "merged", (made.path, 1e6))
    assert [each.name for each in tmp_path.iterdir() if "merged" in each.name] == []


def test_a_tie_that_nobody_knows_of_is_no_guess(tmp_path):
    """A model that transformers does not know: its head may share the embedding."""
    made = make_case(
        Case(lambda: llama(tie=True), {"target_modules": ["embed_tokens"]}), tmp_path / "a"
    )
    save_base(made.base, tmp_path / "base")
    config = {"model_type": "unheard_of", "architectures": ["Unheard"], "vocab_size": 61}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    options = MergeOptions(base=str(tmp_path / "base"), adapters=((made.path, 1.0),))
    with pytest.raises(LoraportError, match="whether the output head shares this embedding"):
        make_plan(options)
    config["tie_word_embeddings"] = False
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    assert make_plan(options).tensors
