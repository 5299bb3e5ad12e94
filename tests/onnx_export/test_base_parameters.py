"""Adapters that depend on the base's weights: where those come from, and what PEFT computes."""

import json
import shutil
import warnings
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from command_line import command
from peft_cases import Case, gpt2, make_case
from tiny_llm import peft_model, save_adapter

from converters.formats.registry import read_adapter
from converters.onnx import ExportOptions, add_adapters, export_base
from converters.onnx.importing import ImportOptions, import_model
from converters.onnx.modules.base_parameters import BaseParameters
from converters.onnx.slots.inserting import SlotOptions
from loraport.adapter import Replacement
from loraport.base.loading import load_model
from loraport.bundle.golden import base_inputs
from loraport.bundle.manifest import read_manifest
from loraport.errors import LoraportError
from loraport.naming import slot_gain
from loraport.parity.changes import changes_of
from loraport.parity.packed import differences
from loraport.runtime import Runtime
from loraport.runtime.resident import read_packed
from loraport.runtime.values import torch_of

TARGETS = ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]
DORA = Case(lambda: None, {"target_modules": TARGETS, "r": 3, "lora_alpha": 5, "use_dora": True})
# float32 logits of some units through two layers.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(scope="module")
def dora(tiny_base, tmp_path_factory):
    return save_adapter(tiny_base, DORA, tmp_path_factory.mktemp("dora") / "dora", seed=3)


def exported(tiny_base, out, precision="fp32", variants=("lora", "gain")):
    options = ExportOptions(precision=precision, slots=SlotOptions(variants))
    export_base(str(tiny_base), out, options)
    return out


@pytest.fixture(scope="module")
def gained(tiny_base, tmp_path_factory):
    return exported(tiny_base, tmp_path_factory.mktemp("gained") / "bundle")


@pytest.fixture(scope="module")
def int4(tiny_base, tmp_path_factory):
    return exported(tiny_base, tmp_path_factory.mktemp("int4") / "bundle", "int4")


@pytest.fixture
def own(gained, tmp_path):
    return shutil.copytree(gained, tmp_path / "own")


def logits(bundle, adapter=None):
    runtime = Runtime(bundle, threads=1, float32_activations=True)
    return runtime.run(base_inputs(bundle, runtime.manifest), adapter, ["logits"])["logits"]


def peft_logits(base, adapter, bundle):
    ids = torch.from_numpy(base_inputs(bundle, read_manifest(bundle))["input_ids"])
    with torch.no_grad():
        return peft_model(base, adapter).eval()(input_ids=ids).logits.numpy()


def test_dora_added_by_command_gives_pefts_logits_and_verifies(own, dora, tiny_base):
    code, said = command("add", own, f"d={dora}")
    assert code == 0, said
    got, expected = logits(own, "d"), peft_logits(tiny_base, dora, own)
    np.testing.assert_allclose(got, expected, **CLOSE)
    assert np.abs(got - logits(own)).max() > 0.1
    code, said = command("verify", own)
    assert code == 0, said
    # The control: a gain of ones is found, by its own check and by the outputs.
    from safetensors.torch import load_file, save_file

    file = own / "adapters" / "d.safetensors"
    tensors = load_file(file)
    gains = [name for name in tensors if name.endswith(".lora_gain")]
    assert gains
    save_file({n: torch.ones_like(t) if n in gains else t for n, t in tensors.items()}, file)
    code, said = command("verify", own)
    assert code == 1
    assert "relative error of its gain" in said


def test_the_graph_itself_gives_the_weights(own, dora, tiny_base):
    (own / "sources.json").unlink()
    add_adapters(own, {"d": read_adapter(dora)})
    np.testing.assert_allclose(logits(own, "d"), peft_logits(tiny_base, dora, own), **CLOSE)


def test_every_weight_of_the_graph_is_the_bases(own, tiny_base):
    (own / "sources.json").unlink()
    model, manifest = load_model(str(tiny_base)), read_manifest(own)
    parameters = BaseParameters(own, manifest)
    for path in manifest.slots.modules():
        weight = model.get_submodule(path).weight.detach()
        assert torch.equal(parameters.weight(path), weight)
        assert torch.equal(parameters.weight(path, in_out=True), weight.T)


@pytest.fixture(scope="module")
def biased(tmp_path_factory):
    """An adapter, and the directory of a base whose last bias is no constant, and of its graph."""
    directory = tmp_path_factory.mktemp("biased")
    made = make_case(Case(gpt2, {"target_modules": ["c_attn"], "r": 2}), directory / "a")
    model = made.fresh_base().eval()
    with torch.no_grad():
        model.get_parameter("transformer.ln_f.bias").add_(torch.arange(model.config.n_embd))
    model.save_pretrained(directory / "base")
    ids = torch.tensor([[1, 5, 3, 9, 2]])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Logits(model), (ids,), directory / "m.onnx", verbose=False)
    return read_adapter(made.path), directory, model.get_parameter("transformer.ln_f.bias").detach()


@pytest.mark.parametrize("with_base", [False, True])
def test_a_bias_that_peft_stored_unchanged_is_the_bases(biased, tmp_path, with_base):
    """PEFT stores what a head has beside its LoRA: a graph's, or a checkpoint's own."""
    adapter, directory, own = biased
    base = str(directory / "base") if with_base else None
    import_model(directory / "m.onnx", tmp_path / "out", ImportOptions(base=base))
    whole = {
        name: replace(adapter, replacements={"transformer.ln_f.bias": each})
        for name, each in (("same", Replacement(own)), ("other", Replacement(own + 0.1)))
    }
    add_adapters(tmp_path / "out", {"same": whole["same"]}, base=base)
    with pytest.raises(LoraportError, match=r"ln_f\.bias: expected a slot"):
        add_adapters(tmp_path / "out", {"other": whole["other"]}, base=base)


def test_a_quantized_graph_needs_the_base(int4, dora, tiny_base, tmp_path):
    own = shutil.copytree(int4, tmp_path / "own")
    (own / "sources.json").unlink()
    code, said = command("add", own, f"d={dora}")
    assert code == 2
    assert "give --base with the model that the bundle was exported from" in said
    assert read_manifest(own).adapters == {}
    code, said = command("add", own, f"d={dora}", "--base", tiny_base)
    assert code == 0, said
    # The gain is the original base's, on rounded weights: not PEFT's logits, but near them.
    base, expected = logits(own), peft_logits(tiny_base, dora, own)
    plain = peft_logits_of_base(tiny_base, own)
    moved, wanted = logits(own, "d") - base, expected - plain
    assert np.linalg.norm(moved - wanted) < 0.35 * np.linalg.norm(wanted)
    code, said = command("verify", own, "--base", tiny_base)
    assert code == 0, said


def peft_logits_of_base(base, bundle):
    ids = torch.from_numpy(base_inputs(bundle, read_manifest(bundle))["input_ids"])
    with torch.no_grad():
        return load_model(str(base))(input_ids=ids).logits.numpy()


def test_the_recorded_checkpoint_serves_a_quantized_graph(int4, dora, tiny_base, tmp_path):
    own = shutil.copytree(int4, tmp_path / "own")
    add_adapters(own, {"d": read_adapter(dora)})
    other = shutil.copytree(int4, tmp_path / "other")
    add_adapters(other, {"d": read_adapter(dora)}, base=str(tiny_base))
    assert np.array_equal(logits(own, "d"), logits(other, "d"))


def test_another_base_is_refused(int4, dora, tiny_base, tmp_path):
    own = shutil.copytree(int4, tmp_path / "own")
    other = load_model(str(tiny_base))
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight[0, 0] += 0.5
    shutil.copytree(tiny_base, tmp_path / "base")
    other.save_pretrained(tmp_path / "base")
    with pytest.raises(LoraportError, match=r"q_proj: expected the base's weight, which DoRA.*"):
        add_adapters(own, {"d": read_adapter(dora)}, base=str(tmp_path / "base"))
    with pytest.raises(LoraportError, match="expected a model directory"):
        add_adapters(own, {"d": read_adapter(dora)}, base=tmp_path / "none")  # a path, not a text


def test_a_checkpoint_with_other_names_is_read_as_a_model(int4, tiny_base, monkeypatch):
    manifest = read_manifest(int4)
    path = "model.layers.1.mlp.down_proj"
    monkeypatch.setattr("loraport.base.weights.NameIndex.candidates", lambda *_: [])
    weight = BaseParameters(int4, manifest, str(tiny_base)).weight(path)
    assert torch.equal(weight, load_model(str(tiny_base)).get_submodule(path).weight.detach())
    with pytest.raises(LoraportError, match="expected this parameter in the base"):
        BaseParameters(int4, manifest, str(tiny_base)).weight("model.gone")


def test_every_slot_is_recorded_at_its_operator_and_the_graph_says_its_maker(gained):
    slots = {slot.name for slot in read_manifest(gained).slots.slots}
    for name in ("model.onnx", "model.required.onnx"):
        proto = onnx.load(gained / name, load_external_data=False)
        said = {entry.key: entry.value for entry in proto.metadata_props}
        assert said["loraport.slots_by"].startswith("loraport ")
        assert said["loraport.slots_in"] == "base"
        recorded = {
            entry.value
            for node in proto.graph.node
            for entry in node.metadata_props
            if entry.key == "loraport.slot"
        }
        assert recorded == slots


class Logits(torch.nn.Module):
    """GPT-2 without its cache."""

    def __init__(self, model):
        super().__init__()
        self.transformer = model.transformer
        self.lm_head = model.lm_head

    def forward(self, input_ids):
        hidden = self.transformer(input_ids=input_ids, use_cache=False)
        return self.lm_head(hidden.last_hidden_state)


def test_dora_on_weights_stored_in_out_equals_peft(tmp_path):
    """GPT-2's ``Conv1D``; a square weight must be turned as PEFT says, no shape tells."""
    from converters.onnx import export_torch_module

    options = {"target_modules": ["c_attn", "c_proj"], "r": 3, "fan_in_fan_out": True}
    made = make_case(Case(gpt2, {**options, "use_dora": True}), tmp_path / "adapter")
    ids = torch.tensor([[1, 5, 3, 9, 2], [4, 8, 0, 1, 5]])
    out = tmp_path / "bundle"
    slots = SlotOptions(("lora", "gain"))
    export_torch_module(Logits(made.fresh_base()), {"input_ids": ids}, out, slots=slots)
    adapter = read_adapter(made.path)
    assert any(m.lora_A.shape[1] == m.lora_B.shape[0] for m in adapter.modules.values())
    add_adapters(out, {"d": adapter})
    got = next(iter(Runtime(out).run({"input_ids": ids.numpy()}, "d").values()))
    with torch.no_grad():
        expected = made.peft_model(input_ids=ids).logits.numpy()
        base = made.base(input_ids=ids).logits.numpy()
    np.testing.assert_allclose(got, expected, **CLOSE)
    assert np.abs(expected - base).max() > 0.05


@pytest.fixture(scope="module")
def square(tmp_path_factory):
    """A DoRA of GPT-2, the directory of its base and of bundles of that, and golden inputs."""
    directory = tmp_path_factory.mktemp("square")
    options = {"target_modules": ["c_attn", "attn.c_proj"], "r": 3, "fan_in_fan_out": True}
    made = make_case(Case(gpt2, {**options, "use_dora": True}), directory / "adapter")
    made.fresh_base().save_pretrained(directory / "base")
    ids = torch.tensor([[1, 5, 3, 9, 2]])
    file, base = directory / "gpt2.onnx", str(directory / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(Logits(made.fresh_base()).eval(), (ids,), file, verbose=False)
    for bundle, precision in (("fp32", None), ("int8", "int8")):
        slots = SlotOptions(("lora", "gain"))
        imported = ImportOptions(base=base, slots=slots, precision=precision)
        import_model(file, directory / bundle, imported)
    return made, directory, ids


@pytest.mark.parametrize("said", [True, False])
def test_square_weights_lie_as_the_base_has_them_whatever_the_adapter_says(square, tmp_path, said):
    """PEFT writes one ``fan_in_fan_out``, and writes it wrong where it corrects itself."""
    made, directory, ids = square
    for name in ("adapter", "fp32", "int8"):
        shutil.copytree(directory / name, tmp_path / name)
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "fan_in_fan_out": said}))
    adapter = read_adapter(tmp_path / "adapter")
    packed = {}
    for bundle, name, given in (
        ("fp32", "graph", None),
        ("fp32", "checkpoint", str(directory / "base")),
        ("int8", "rounded", None),
    ):
        out = tmp_path / bundle
        add_adapters(out, {name: adapter}, base=given)
        manifest = read_manifest(out)
        packed[name] = read_packed(out / manifest.adapters[name].tensors, manifest.slots)
    runtime = Runtime(tmp_path / "fp32")
    with torch.no_grad():
        expected = made.peft_model(input_ids=ids).logits.numpy()
        idle = made.base(input_ids=ids).logits.numpy()
    (feed,) = runtime.session.get_inputs()
    got = next(iter(runtime.run({feed.name: ids.numpy()}, "graph").values()))
    np.testing.assert_allclose(got, expected, **CLOSE)
    assert np.abs(expected - idle).max() > 0.05
    for name in ("checkpoint", "rounded"):
        assert packed[name].keys() == packed["graph"].keys()
        for key, array in packed["graph"].items():
            np.testing.assert_allclose(packed[name][key], array, rtol=1e-5, atol=1e-6)
    changes = changes_of([(adapter, 1.0)], made.fresh_base())
    tensors = {key: torch_of(array) for key, array in packed["graph"].items()}
    own = made.base.get_parameter
    assert differences(tensors, runtime.manifest.slots, changes, own) == []
    tensors[slot_gain("transformer.h.0.attn.c_proj")] *= 1.01
    assert differences(tensors, runtime.manifest.slots, changes, own) != []
