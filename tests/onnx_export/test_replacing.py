"""Whole parameters as graph inputs: ``modules_to_save``, heads, norms, biases, trained tokens."""

import shutil
import warnings

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from command_line import command
from peft_cases import Case, bert, gpt2, make_case
from tiny_llm import SIZES, peft_model, save_adapter, save_base

from converters.formats.registry import read_adapter
from converters.onnx import ExportOptions, add_adapters, export_base, export_torch_module
from converters.onnx.exporters.torch_exporter import export_module
from converters.onnx.importing import ImportOptions, import_model
from converters.onnx.modules.holders import BaseHolders
from converters.onnx.slots.inserting import SlotOptions
from converters.onnx.slots.replacing import make_replaceable
from loraport.bundle.base_values import BASE_VALUES_FILE, BaseValues
from loraport.bundle.golden import base_inputs
from loraport.bundle.manifest import read_manifest
from loraport.errors import LoraportError
from loraport.parity import Sample, verify_bundle
from loraport.runtime import Runtime

CLOSE = {"rtol": 1e-4, "atol": 1e-4}  # float32 logits of some units through two layers
SAVED = {"target_modules": ["q_proj", "down_proj"], "r": 3, "lora_alpha": 5}


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(5)
    model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=True, attention_bias=True))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return save_base(tmp_path_factory.mktemp("tied") / "base", model)


def decoder_bundle(base, out, replace, variants=("lora",), lm_head=False, precision="fp32"):
    slots = SlotOptions(variants, replace=replace)
    export_base(str(base), out, ExportOptions(precision=precision, lm_head=lm_head, slots=slots))
    return out


@pytest.fixture(scope="module")
def decoder(tiny_base, tmp_path_factory):
    out = tmp_path_factory.mktemp("replace") / "bundle"
    return decoder_bundle(tiny_base, out, ("lm_head", "norm", "input_layernorm"))


@pytest.fixture(scope="module")
def tokens(tied_base, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokens") / "bundle"
    replace = ("embed_tokens", "post_attention_layernorm")
    return decoder_bundle(tied_base, out, replace, ("lora", "embedding"), lm_head=True)


def logits(bundle, adapter=None):
    runtime = Runtime(bundle, threads=1)
    return runtime.run(base_inputs(bundle, runtime.manifest), adapter, ["logits"])["logits"]


def peft_logits(base, adapter, bundle):
    ids = torch.from_numpy(base_inputs(bundle, read_manifest(bundle))["input_ids"])
    with torch.no_grad():
        return peft_model(base, adapter).eval()(input_ids=ids).logits.numpy()


def made_for(base, out, options, seed=2):
    return save_adapter(base, Case(lambda: None, options), out, seed=seed)


def added(bundle, tmp_path, **adapters):
    own = shutil.copytree(bundle, tmp_path / "own")
    code, said = command("add", own, *(f"{name}={path}" for name, path in adapters.items()))
    assert code == 0, said
    return own


def test_a_saved_head_and_norms_give_pefts_logits_and_verify(decoder, tiny_base, tmp_path):
    options = {**SAVED, "modules_to_save": ["lm_head", "model.norm", "input_layernorm"]}
    path = made_for(tiny_base, tmp_path / "a", options)
    stored = read_adapter(path).replacements
    assert {"lm_head.weight", "model.norm.weight"} <= stored.keys()
    assert any("input_layernorm" in name for name in stored)
    own = added(decoder, tmp_path, a=path)
    got = logits(own, "a")
    np.testing.assert_allclose(got, peft_logits(tiny_base, path, own), **CLOSE)
    assert np.abs(got - logits(own)).max() > 0.5
    code, said = command("verify", own)
    assert code == 0, said
    # The control: a head that is another one is found.
    from safetensors.torch import load_file, save_file

    file = own / "adapters" / "a.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight.lora_saved"][2, 3] += 1
    save_file(tensors, file)
    code, said = command("verify", own)
    assert code == 1
    assert "lm_head.weight: another value" in said


def test_the_base_is_the_base_bit_for_bit_and_no_data_is_copied(decoder, bare_bundle):
    inputs = base_inputs(decoder, read_manifest(decoder))
    plain = Runtime(bare_bundle, threads=1).run(inputs, None, ["logits"])["logits"]
    assert np.array_equal(logits(decoder), plain)
    sizes = [(b / "model.onnx.data").stat().st_size for b in (decoder, bare_bundle)]
    assert sizes[0] == sizes[1]
    proto = onnx.load(decoder / "model.onnx", load_external_data=False)
    names = {tensor.name for tensor in proto.graph.initializer}
    assert "lm_head.weight.lora_saved" in names
    assert len(names) == len(proto.graph.initializer)


def test_the_required_graph_and_the_base_values_are_enough(decoder):
    import onnxruntime

    manifest = read_manifest(decoder)
    assert BASE_VALUES_FILE in manifest.files
    values = BaseValues(decoder)
    assert set(values) == {slot.input for slot in manifest.slots.replacements}
    feeds = dict(values)
    for _, _, entry in manifest.slots.low_rank_inputs():
        feeds[entry.name] = np.full(entry.neutral_shape, entry.neutral, np.float32)
    session = onnxruntime.InferenceSession(decoder / "model.required.onnx")
    inputs = base_inputs(decoder, manifest)
    got = session.run(["logits"], {**inputs, **feeds})[0]
    np.testing.assert_allclose(got, logits(decoder), rtol=1e-5, atol=1e-5)
    feeds["model.norm.weight.lora_saved"] *= 2
    assert np.abs(session.run(["logits"], {**inputs, **feeds})[0] - got).max() > 0.1


def test_an_adapter_with_saved_modules_on_a_bundle_without_says_what_to_export(
    bare_bundle, tiny_base, tmp_path
):
    path = made_for(tiny_base, tmp_path / "a", {**SAVED, "modules_to_save": ["lm_head", "norm"]})
    own = shutil.copytree(bare_bundle, tmp_path / "own")
    code, said = command("add", own, f"a={path}")
    assert code == 2
    assert "lm_head.weight: expected a slot for this parameter, got none" in said
    assert "export again with --replace lm_head" in said
    assert "export again with --replace model.norm" in said
    assert read_manifest(own).adapters == {}


def test_a_saved_embedding_leaves_a_tied_head_as_peft_does(tokens, tied_base, tmp_path):
    options = {
        **SAVED,
        "modules_to_save": ["embed_tokens", "post_attention_layernorm"],
    }
    path = made_for(tied_base, tmp_path / "a", options)
    own = added(tokens, tmp_path, a=path)
    got = logits(own, "a")
    np.testing.assert_allclose(got, peft_logits(tied_base, path, own), **CLOSE)
    assert np.abs(got - logits(own)).max() > 0.5
    code, said = command("verify", own)
    assert code == 0, said


@pytest.mark.parametrize("with_lora", [False, True])
def test_trained_tokens_act_on_the_embedding_and_the_tied_head(
    tokens, tied_base, tmp_path, with_lora
):
    targets = ["q_proj", "embed_tokens"] if with_lora else ["q_proj"]
    inputs = base_inputs(tokens, read_manifest(tokens))["input_ids"]
    trained = sorted({int(inputs[0, 1]), int(inputs[0, 3]), 7, SIZES["vocab_size"] - 1})
    options = {**SAVED, "target_modules": targets, "trainable_token_indices": trained}
    if with_lora:
        options["target_modules"] = ["q_proj", "lm_head"]
    path = made_for(tied_base, tmp_path / "a", options)
    own = added(tokens, tmp_path, a=path)
    got = logits(own, "a")
    np.testing.assert_allclose(got, peft_logits(tied_base, path, own), **CLOSE)
    moved = np.abs(got - logits(own)).max(axis=(0, 1))
    assert moved[trained].min() > 0.1
    code, said = command("verify", own)
    assert code == 0, said


def test_trained_tokens_of_a_tied_head_without_slot_are_refused(tied_base, tmp_path):
    bundle = decoder_bundle(tied_base, tmp_path / "b", (), ("lora", "embedding"))
    path = made_for(tied_base, tmp_path / "a", {**SAVED, "trainable_token_indices": [3, 5]})
    code, said = command("add", bundle, f"a={path}")
    assert code == 2
    assert "lm_head: expected a slot, as it shares the weight whose tokens were trained" in said
    assert "--lm-head" in said


def test_trained_biases_of_packed_modules_go_into_the_bias_slots(tied_base, tmp_path):
    """GenAI packs q, k and v with their biases; the slot adds what the training moved them by."""
    bundle = decoder_bundle(tied_base, tmp_path / "b", (), ("lora", "bias"))
    for name, kind in (("only", "lora_only"), ("all", "all")):
        options = {**SAVED, "target_modules": ["q_proj", "v_proj", "o_proj"], "bias": kind}
        path = made_for(tied_base, tmp_path / name, options)
        assert any(
            parameter.endswith("q_proj.bias") for parameter in read_adapter(path).replacements
        )
        code, said = command("add", bundle, f"{name}={path}")
        assert code == 0, said
        got = logits(bundle, name)
        np.testing.assert_allclose(got, peft_logits(tied_base, path, bundle), **CLOSE)
        assert np.abs(got - logits(bundle)).max() > 0.1
    code, said = command("verify", bundle)
    assert code == 0, said
    from safetensors.torch import load_file, save_file

    file = bundle / "adapters" / "only.safetensors"
    tensors = load_file(file)
    changed = next(name for name in tensors if name.endswith("v_proj.lora_bias"))
    tensors[changed][-1] += 1
    save_file(tensors, file)
    code, said = command("verify", bundle, "--json")
    assert code == 1
    assert "relative error of its bias" in said


@pytest.mark.parametrize("taken", [True, False])
def test_the_advice_for_packed_biases_is_their_slot(taken):
    """The control: one that is no module's with a slot, and one that the graph holds as it is."""
    values = torch.arange(8.0).split([2, 3, 1, 2])
    names = ("q_proj.bias", "k_proj.bias", "other.bias", "norm.bias")
    packed = onnx.numpy_helper.from_array(torch.cat(values[:3]).numpy(), "packed")
    own = onnx.numpy_helper.from_array(values[3].numpy(), "own")
    ends = [onnx.helper.make_tensor_value_info(name, 1, None) for name in "xuyv"]
    nodes = [
        onnx.helper.make_node("Add", ["x", "packed"], ["y"]),
        onnx.helper.make_node("Add", ["u", "own"], ["v"]),
    ]
    graph = ir.from_proto(
        onnx.helper.make_model(
            onnx.helper.make_graph(nodes, "g", ends[:2], ends[2:], [packed, own])
        )
    ).graph
    holders = BaseHolders(graph, dict(zip(names, values, strict=True)), ())
    biases = dict.fromkeys(names[:2], taken)
    if not taken:
        with pytest.raises(LoraportError, match=r"k_proj\.bias: .* with bias among --slots"):
            make_replaceable(graph, ["k_proj"], holders, biases)
    else:
        assert make_replaceable(graph, ["k_proj"], holders, biases).slots == ()
    made = make_replaceable(graph, ["bias"], holders, biases)
    assert [slot.parameter for slot in made.slots] == ["norm.bias"]
    assert "merge the adapter" in made.refused.pop("other.bias")
    assert set(made.refused) == (set() if taken else set(names[:2]))
    assert all("export again with bias among --slots" in why for why in made.refused.values())


def test_strengths_and_rows_are_refused_with_whole_parameters(tiny_base, tmp_path):
    for option in ("--strength-input", "--per-row"):
        code, said = command(
            "export", tiny_base, "-o", tmp_path / "b", "--replace", "lm_head", option
        )
        assert code == 2
        assert "a whole parameter is one for all" in said
        assert not (tmp_path / "b").exists()


def test_names_that_mean_nothing_are_refused_all_at_once(tiny_base, tmp_path):
    code, said = command(
        "export", tiny_base, "-o", tmp_path / "b", "--replace", "score", "--replace", "q_proj"
    )
    assert code == 2
    assert "score: expected a parameter that the graph can take anew, got none of this name" in said
    assert "q_proj.weight: the graph does not hold it as it is" in said
    assert not (tmp_path / "b").exists()


# -- an encoder with a classifier, through torch.onnx.export and from somebody else's file --------

BERT_SAVED = {
    "classifier": {"target_modules": ["query", "dense"], "r": 3, "task_type": "SEQ_CLS"},
    "biases": {"target_modules": ["query", "value"], "r": 3, "bias": "all"},
    "norms": {"target_modules": ["query"], "r": 3, "modules_to_save": ["LayerNorm", "classifier"]},
    "embedding": {"target_modules": ["query"], "modules_to_save": ["word_embeddings"]},
}
REPLACE = ("classifier", "bias", "LayerNorm", "word_embeddings")


def bert_arrays():
    ids = np.random.default_rng(0).integers(1, 61, (2, 7))
    return {"input_ids": ids, "attention_mask": np.ones_like(ids)}


@pytest.fixture(scope="module")
def bert_base():
    torch.manual_seed(0)
    base = bert().eval()
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if name.endswith("bias") or "LayerNorm" in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return base


@pytest.fixture(scope="module")
def bert_bundle(bert_base, tmp_path_factory):
    out = tmp_path_factory.mktemp("bert") / "bundle"
    inputs = {name: torch.from_numpy(array) for name, array in bert_arrays().items()}
    slots = SlotOptions(("lora", "gain", "bias"), replace=REPLACE)
    export_torch_module(bert_base, inputs, out, slots=slots)
    return out


def bert_reference(made):
    inputs = {name: torch.from_numpy(array) for name, array in bert_arrays().items()}
    with torch.no_grad():
        base, adapted = (m.eval()(**inputs).logits.numpy() for m in (made.base, made.peft_model))
    assert np.abs(base - adapted).max() > 0.05
    return adapted


@pytest.mark.parametrize("name", BERT_SAVED)
def test_an_encoder_equals_peft(name, bert_base, bert_bundle, tmp_path):
    made = make_case(Case(bert, BERT_SAVED[name]), tmp_path / "a", base=bert_base)
    own = shutil.copytree(bert_bundle, tmp_path / "own")
    adapter = read_adapter(made.path)
    assert adapter.replacements
    add_adapters(own, {"a": adapter})
    got = Runtime(own).run(bert_arrays(), "a")["logits"]
    np.testing.assert_allclose(got, bert_reference(made), **CLOSE)
    sample = Sample(bert_arrays(), bert_arrays())
    report = verify_bundle(own, made.fresh_base(), {"a": adapter}, samples=[sample])
    assert report.passed, [check for check in report.checks if not check.passed]


def test_a_blend_moves_parameters_away_from_the_base(bert_base, bert_bundle, tmp_path):
    from loraport.parity.changes import changes_of
    from loraport.parity.reference import adapted, torch_outputs

    own = shutil.copytree(bert_bundle, tmp_path / "own")
    adapters = {}
    for seed, name in enumerate(("classifier", "norms")):
        made = make_case(Case(bert, BERT_SAVED[name]), tmp_path / name, seed, base=bert_base)
        adapters[name] = read_adapter(made.path)
    add_adapters(own, adapters)
    model = made.fresh_base().double()
    for strengths in ({"classifier": 0.5, "norms": -0.3}, {"norms": 1.7}, {"classifier": 1.0}):
        parts = [(adapters[name], strength) for name, strength in strengths.items()]
        with adapted(model, changes_of(parts, model)):
            expected = torch_outputs(model, bert_arrays())[0]
        got = Runtime(own).run(bert_arrays(), strengths)["logits"]
        np.testing.assert_allclose(got, expected, **CLOSE)


@pytest.fixture(scope="module")
def fresh_base():
    """Biases are zeros and norms ones, as in a model with a new head: exporters share those."""
    torch.manual_seed(1)
    return bert().eval()


def as_initialised(base, made):
    """The base and PEFT's model on it; `make_case` has left it alone."""
    bias = base.get_submodule("classifier").bias
    assert not bias.any()
    return bert_reference(made)


@pytest.fixture(scope="module")
def fresh_bundle(fresh_base, tmp_path_factory):
    out = tmp_path_factory.mktemp("fresh") / "bundle"
    inputs = {name: torch.from_numpy(array) for name, array in bert_arrays().items()}
    slots = SlotOptions(replace=("classifier", "bias", "LayerNorm"))
    export_torch_module(fresh_base, inputs, out, slots=slots)
    return out


@pytest.mark.parametrize("name", ["classifier", "biases", "norms"])
def test_equal_parameters_are_replaced_apart(name, fresh_base, fresh_bundle, tmp_path):
    made = make_case(Case(bert, BERT_SAVED[name]), tmp_path / "a", base=fresh_base)
    inputs = {name: torch.from_numpy(array) for name, array in bert_arrays().items()}
    own = shutil.copytree(fresh_bundle, tmp_path / "out")
    with torch.no_grad():
        plain = fresh_base(**inputs).logits.numpy()
    np.testing.assert_allclose(Runtime(own).run(bert_arrays())["logits"], plain, **CLOSE)
    add_adapters(own, {"a": read_adapter(made.path)})
    got = Runtime(own).run(bert_arrays(), "a")["logits"]
    np.testing.assert_allclose(got, as_initialised(fresh_base, made), **CLOSE)


@pytest.fixture(scope="module")
def fresh_file(fresh_base, tmp_path_factory):
    """What torch alone makes of it; the base is beside it."""
    file = tmp_path_factory.mktemp("fresh") / "m.onnx"
    inputs = {name: torch.from_numpy(array) for name, array in bert_arrays().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(fresh_base, kwargs=inputs, dynamo=True, verbose=False)
    program.save(file)
    fresh_base.save_pretrained(file.parent / "base")
    return file


@pytest.mark.parametrize("with_base", [False, True])
def test_a_constant_that_equal_parameters_share_is_no_place(with_base, fresh_file, tmp_path):
    base = str(fresh_file.parent / "base") if with_base else None
    options = ImportOptions(base, SlotOptions(replace=("LayerNorm",)))
    with pytest.raises(LoraportError, match=r"LayerNorm\.(weight|bias): (the graph|several)"):
        import_model(fresh_file, tmp_path / "out", options)


@pytest.fixture(scope="module")
def dynamo_file(bert_base, tmp_path_factory):
    directory = tmp_path_factory.mktemp("dynamo")
    inputs = {name: torch.from_numpy(array) for name, array in bert_arrays().items()}
    export_module(bert_base, inputs, directory, dynamic={})
    return directory / "model.onnx"


@pytest.mark.parametrize("with_base", [False, True])
def test_a_file_of_another_tool(with_base, bert_base, dynamo_file, tmp_path):
    """torch's dynamo exporter keeps the parameters' names; without a base these must do."""
    made = make_case(Case(bert, BERT_SAVED["classifier"]), tmp_path / "a", base=bert_base)
    if with_base:
        made.base.save_pretrained(tmp_path / "base")
    slots = SlotOptions(("lora",), replace=("classifier", "LayerNorm"))
    base = str(tmp_path / "base") if with_base else None
    import_model(dynamo_file, tmp_path / "out", ImportOptions(base, slots))
    add_adapters(tmp_path / "out", {"a": read_adapter(made.path)})
    got = Runtime(tmp_path / "out").run(bert_arrays(), "a")["logits"]
    np.testing.assert_allclose(got, bert_reference(made), **CLOSE)
    data = tmp_path / "out" / "model.onnx.data"
    assert data.samefile(dynamo_file.with_name("model.onnx.data"))


class _Gpt2(torch.nn.Module):
    """GPT-2 without its cache."""

    def __init__(self, model):
        super().__init__()
        self.transformer = model.transformer

    def forward(self, ids):
        return self.transformer(input_ids=ids, use_cache=False).last_hidden_state


def test_weights_stored_in_out_are_replaced_as_they_lie(tmp_path):
    """Square ones, too: no shape tells that GPT-2's ``Conv1D`` is no ``Linear``."""
    options = {"target_modules": ["c_attn"], "r": 2, "fan_in_fan_out": True}
    options["modules_to_save"] = ["attn.c_proj", "c_fc"]
    made = make_case(Case(gpt2, options), tmp_path / "a")
    ids = torch.tensor([[1, 5, 3, 9, 2]])
    plain = _Gpt2(made.fresh_base()).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(plain, (ids,), tmp_path / "m.onnx", verbose=False)
    slots = SlotOptions(("lora",), replace=("attn.c_proj", "c_fc"))
    import_model(tmp_path / "m.onnx", tmp_path / "out", ImportOptions(slots=slots))
    add_adapters(tmp_path / "out", {"a": read_adapter(made.path)})
    with torch.no_grad():
        base = plain(ids).numpy()
        expected = _Gpt2(made.peft_model.get_base_model())(ids).numpy()
    (got,) = Runtime(tmp_path / "out").run({"ids": ids.numpy()}, "a").values()
    np.testing.assert_allclose(got, expected, **CLOSE)
    assert np.abs(expected - base).max() > 0.05


def test_the_graphs_and_the_manifest_are_valid_and_always_the_same(
    bert_base, bert_bundle, tmp_path
):
    import json
    from pathlib import Path

    import jsonschema

    import loraport.bundle

    for name in ("model.onnx", "model.required.onnx"):
        onnx.checker.check_model(str(bert_bundle / name), full_check=True)
        proto = onnx.load(bert_bundle / name)
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
        names = [value.name for value in proto.graph.input]
        assert len(names) == len(set(names))
    schema = Path(loraport.bundle.__file__).parent / "manifest.schema.json"
    document = json.loads((bert_bundle / "manifest.json").read_text())
    assert document["replacements"]
    jsonschema.validate(document, json.loads(schema.read_text()))
    inputs = {name: torch.from_numpy(array) for name, array in bert_arrays().items()}
    slots = SlotOptions(("lora", "gain", "bias"), replace=REPLACE)
    export_torch_module(bert_base, inputs, tmp_path / "again", slots=slots)
    for name in ("model.onnx", "model.required.onnx", "model.onnx.data", BASE_VALUES_FILE):
        assert (tmp_path / "again" / name).read_bytes() == (bert_bundle / name).read_bytes()


def test_a_weight_of_another_shape_is_refused(bert_bundle, bert_base, tmp_path):
    from dataclasses import replace

    made = make_case(Case(bert, BERT_SAVED["classifier"]), tmp_path / "a", base=bert_base)
    adapter = read_adapter(made.path)
    name = "classifier.weight"
    wrong = replace(adapter.replacements[name], tensor=adapter.replacements[name].tensor[:-1])
    adapter = replace(adapter, replacements={**adapter.replacements, name: wrong})
    own = shutil.copytree(bert_bundle, tmp_path / "own")
    with pytest.raises(LoraportError, match=r"classifier\.weight: expected \[3, 32\], got \[2, 32"):
        add_adapters(own, {"a": adapter})
