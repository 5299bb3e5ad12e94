"""Verification must be able to fail: each kind of damage is caught by the check that names it."""

import copy
import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from safetensors.torch import load_file, save_file
from tiny_llm import TEXTS, tokenizer

from converters.formats.registry import read_adapter
from converters.onnx.packing.adding import write_onnx_adapter
from loraport.base.loading import load_model
from loraport.bundle.golden import record_no_golden
from loraport.bundle.manifest import read_manifest, write_manifest
from loraport.bundle.slots import SlotTable
from loraport.errors import LoraportError
from loraport.parity import Sample, verify_bundle
from loraport.parity.reference import next_token_logits
from loraport.runtime import Runtime
from loraport.runtime.decoder import first_step_inputs, read_decoder

DOWN = "model.layers.1.mlp.down_proj"
PACKED = "model.layers.0.self_attn.q_proj+k_proj+v_proj"


@pytest.fixture(scope="module")
def model(tiny_base):
    return load_model(str(tiny_base))


@pytest.fixture(scope="module")
def sources(adapters):
    return {name: read_adapter(path) for name, path in adapters.items()}


def few_samples(bundle):
    """Four prompts: enough to find every damage, quickly."""
    runtime = Runtime(bundle, check=False, threads=1)
    found = []
    for text in TEXTS:
        ids = tokenizer()(text)["input_ids"]
        array = np.array([ids], np.int64)
        arguments = {"input_ids": array, "attention_mask": np.ones_like(array)}
        found.append(Sample(first_step_inputs(runtime, read_decoder(bundle), ids), arguments, ids))
    return found


def failed(bundle, model, sources):
    """Run the protocol; name → detail of each check that failed."""
    report = verify_bundle(bundle, model, sources, samples=few_samples(bundle))
    assert report.passed == all(check.passed for check in report.checks)
    json.dumps(report.to_json())
    return {check.name: check.detail for check in report.checks if not check.passed}


def update_hashes(bundle):
    """Write the manifest as if all files were meant to be as they are."""
    manifest = read_manifest(bundle)
    write_manifest(manifest.with_files(bundle, list(manifest.files)), bundle)


def change_tensors(bundle, name, change, *, both=True):
    """Change an adapter's tensors in its files, with their hashes."""
    entry = read_manifest(bundle).adapters[name]
    tensors = change(load_file(bundle / entry.tensors))
    save_file(tensors, bundle / entry.tensors)
    if both:
        write_onnx_adapter(tensors, bundle / entry.file)
    update_hashes(bundle)


def test_the_intact_bundle_passes_with_enough_prompts(bundle, model, sources):
    report = verify_bundle(bundle, model, sources)
    assert report.passed, [check for check in report.checks if not check.passed]
    assert report.samples >= 20
    names = [check.name for check in report.checks]
    assert len(names) == len(set(names))
    for expected in (
        "files",
        "slots",
        "base: onnxruntime = torch",
        "adapter a: packed = source",
        "adapter b: torch merged = beside",
        "adapter a: onnxruntime = torch",
        "adapter b: differs from base",
        "adapter a: greedy tokens",
        "adapter b: .onnx_adapter = .safetensors",
        "blend a=0.75 b=0.5: onnxruntime = torch",
        "swaps a → b → a → none repeat bit for bit",
        "model.required.onnx = model.onnx",
        "golden cases",
    ):
        assert expected in names
    worst = max(check.comparison.max_abs for check in report.checks if "= torch" in check.name)
    assert 0 < worst < 1e-4


def weight_offset(bundle, path):
    """Where in the data file a module's weight begins, by the graph's own reference."""
    graph = onnx.load(str(bundle / "model.onnx"), load_external_data=False).graph
    named = {tensor.name: tensor for tensor in graph.initializer}
    node = next(node for node in graph.node if node.name == f"/{path}/MatMul")
    places = {entry.key: entry.value for entry in named[node.input[1]].external_data}
    return int(places["offset"])


@pytest.mark.parametrize("hashes", [False, True])
def test_a_corrupted_weight(own_bundle, model, sources, hashes):
    start = weight_offset(own_bundle, "model/layers.1/mlp/down_proj")
    data = bytearray((own_bundle / "model.onnx.data").read_bytes())
    value = np.frombuffer(data, np.float32, 1, start)[0]
    data[start + 3] ^= 0x40  # the exponent's highest bit
    assert np.frombuffer(data, np.float32, 1, start)[0] != value
    (own_bundle / "model.onnx.data").write_bytes(data)
    if hashes:
        update_hashes(own_bundle)
    found = failed(own_bundle, model, sources)
    assert ("files" in found) != hashes
    if not hashes:
        assert "model.onnx.data: expected sha256" in found["files"]
    assert "base: onnxruntime = torch" in found
    assert "adapter a: onnxruntime = torch" in found


def test_a_corrupted_byte_that_changes_little_is_found_by_its_hash(own_bundle, model, sources):
    start = weight_offset(own_bundle, "model/layers.1/mlp/down_proj")
    data = bytearray((own_bundle / "model.onnx.data").read_bytes())
    data[start] ^= 1  # the mantissa's lowest bit
    (own_bundle / "model.onnx.data").write_bytes(data)
    assert failed(own_bundle, model, sources).keys() == {"files"}


@pytest.mark.parametrize("hashes", [False, True])
def test_adapters_whose_files_are_swapped(own_bundle, model, sources, hashes):
    for suffix in ("safetensors", "onnx_adapter"):
        a, b = (own_bundle / "adapters" / f"{name}.{suffix}" for name in "ab")
        kept = a.read_bytes()
        shutil.copyfile(b, a)
        b.write_bytes(kept)
    if hashes:
        update_hashes(own_bundle)
    found = failed(own_bundle, model, sources)
    assert ("files" in found) != hashes
    assert "no tensors for slot model.layers.0.mlp.up_proj" in found["adapter a: packed = source"]
    assert "relative error" in found["adapter b: packed = source"]
    assert {f"adapter {name}: onnxruntime = torch" for name in "ab"} <= found.keys()


def test_only_the_onnx_adapters_are_swapped(own_bundle, model, sources):
    # Whoever feeds .onnx_adapter files to ONNX Runtime would run the wrong adapter.
    a, b = (own_bundle / "adapters" / f"{name}.onnx_adapter" for name in "ab")
    kept = a.read_bytes()
    shutil.copyfile(b, a)
    b.write_bytes(kept)
    update_hashes(own_bundle)
    found = failed(own_bundle, model, sources)
    assert found.keys() == {f"adapter {name}: .onnx_adapter = .safetensors" for name in "ab"}
    detail = found["adapter a: .onnx_adapter = .safetensors"]
    assert "model.layers.0.mlp.up_proj.lora_A is missing" in detail
    assert " more" in detail


def test_an_onnx_adapter_with_a_flipped_bit(own_bundle, model, sources):
    file = own_bundle / "adapters" / "a.onnx_adapter"
    content = bytearray(file.read_bytes())
    tensor = load_file(own_bundle / "adapters" / "a.safetensors")[f"{PACKED}.lora_A"]
    content[content.find(tensor.numpy().tobytes())] ^= 1
    file.write_bytes(content)
    update_hashes(own_bundle)
    found = failed(own_bundle, model, sources)
    assert found.keys() == {"adapter a: .onnx_adapter = .safetensors"}
    assert found["adapter a: .onnx_adapter = .safetensors"] == f"{PACKED}.lora_A differs"


def test_an_onnx_adapter_that_cannot_be_read(own_bundle, model, sources):
    (own_bundle / "adapters" / "a.onnx_adapter").write_bytes(b"nothing of the kind")
    update_hashes(own_bundle)
    found = failed(own_bundle, model, sources)
    assert found.keys() == {"adapter a: .onnx_adapter = .safetensors"}


def test_a_slot_dropped_from_the_adapters_tensors(own_bundle, model, sources):
    def drop(tensors):
        return {key: value for key, value in tensors.items() if not key.startswith(DOWN)}

    change_tensors(own_bundle, "a", drop)
    found = failed(own_bundle, model, sources)
    assert found["adapter a: packed = source"] == f"{DOWN}: no tensors for slot {DOWN}"
    assert "adapter a: onnxruntime = torch" in found
    assert not any(name.startswith("adapter b") for name in found)


def test_a_slot_dropped_from_the_slot_table(own_bundle, model, sources):
    manifest = read_manifest(own_bundle)
    left = tuple(slot for slot in manifest.slots.slots if slot.name != DOWN)
    write_manifest(replace(manifest, slots=SlotTable(left)), own_bundle)
    found = failed(own_bundle, model, sources)
    assert f"{DOWN}.lora_A is not in the slot table" in found["slots"]
    assert f"{DOWN}.lora_B is not in the slot table" in found["slots"]
    assert f"{DOWN}.lora_A: expected a slot input of this bundle" in found["adapter a"]


def test_a_slot_dropped_from_the_graph(own_bundle, model, sources):
    graph = onnx.load(str(own_bundle / "model.onnx"), load_external_data=False)
    last = next(
        node
        for node in graph.graph.node
        if node.name.startswith(f"{DOWN}.lora/") and node.op_type == "Gemm"
    )
    # The slot's inputs stay, but count for nothing.
    last.attribute.append(helper.make_attribute("alpha", 0.0))
    onnx.save(graph, str(own_bundle / "model.onnx"))
    update_hashes(own_bundle)
    found = failed(own_bundle, model, sources)
    assert "base: onnxruntime = torch" not in found
    assert {f"adapter {name}: onnxruntime = torch" for name in "ab"} <= found.keys()
    assert "model.required.onnx = model.onnx" in found


def test_a_slot_whose_columns_are_another_modules(own_bundle, model, sources):
    # q/k/v in another order: the shapes all fit.
    manifest = read_manifest(own_bundle)
    slots = list(manifest.slots.slots)
    packed = slots[0]
    q, k, v = packed.members
    k, v = replace(k, module_path=v.module_path), replace(v, module_path=k.module_path)
    slots[0] = replace(packed, members=(q, k, v))
    write_manifest(replace(manifest, slots=SlotTable(tuple(slots))), own_bundle)
    found = failed(own_bundle, model, sources)
    assert "k_proj: relative error" in found["adapter a: packed = source"]
    assert "v_proj: relative error" in found["adapter a: packed = source"]


def test_a_wrong_scaling(own_bundle, model, sources):
    def double(tensors):
        return {key: value * 2 if key.endswith("B") else value for key, value in tensors.items()}

    change_tensors(own_bundle, "b", double)
    found = failed(own_bundle, model, sources)
    assert (
        "model.layers.0.self_attn.q_proj: relative error 1" in found["adapter b: packed = source"]
    )
    assert "adapter b: onnxruntime = torch" in found
    assert not any(name.startswith("adapter a") for name in found)


def test_an_adapter_of_zeros_fails_the_negative_control(own_bundle, model, sources):
    def zero(tensors):
        return {key: torch.zeros_like(value) for key, value in tensors.items()}

    modules = {
        path: replace(module, lora_B=torch.zeros_like(module.lora_B))
        for path, module in sources["a"].modules.items()
    }
    zeros = replace(sources["a"], modules=modules)
    change_tensors(own_bundle, "a", zero)
    found = failed(own_bundle, model, {"a": zeros})
    assert found.pop("golden cases")
    assert found == {
        "adapter a: differs from base": "the adapter changes no more than the tolerance"
    }


def test_nan_in_an_adapter_fails(own_bundle, model, sources):
    def spoil(tensors):
        tensors[f"{DOWN}.lora_B"][0, 3] = float("nan")
        return tensors

    change_tensors(own_bundle, "a", spoil)
    found = failed(own_bundle, model, sources)
    assert f"{DOWN}: relative error nan" in found["adapter a: packed = source"]
    assert {"adapter a: onnxruntime = torch", "adapter a: differs from base"} <= found.keys()


def test_nan_in_the_source_too_fails(own_bundle, model, sources):
    # Both sides agree; agreeing on nothing is no parity.
    lora_B = sources["a"].modules[DOWN].lora_B.clone()
    lora_B[3, 0] = float("nan")
    modules = {**sources["a"].modules, DOWN: replace(sources["a"].modules[DOWN], lora_B=lora_B)}

    def spoil(tensors):
        tensors[f"{DOWN}.lora_B"][0, 3] = float("nan")
        return tensors

    change_tensors(own_bundle, "a", spoil)
    found = failed(own_bundle, model, {"a": replace(sources["a"], modules=modules)})
    assert {"adapter a: packed = source", "adapter a: onnxruntime = torch"} <= found.keys()


def test_another_base_fails(own_bundle, sources, tiny_base):
    other = load_model(str(tiny_base))
    with torch.no_grad():
        other.model.layers[0].mlp.up_proj.weight[0, 0] += 0.5
    found = failed(own_bundle, other, sources)
    assert {"base: onnxruntime = torch", "adapter a: onnxruntime = torch"} <= found.keys()


def test_golden_outputs_that_are_not_reproduced(own_bundle, model, sources):
    file = own_bundle / "golden" / "adapter-b.safetensors"
    tensors = load_file(file)
    tensors["output.logits"][0, 0, 0] += 0.1
    save_file(tensors, file)
    update_hashes(own_bundle)
    found = failed(own_bundle, model, sources)
    assert found.keys() == {"golden cases"}
    assert "adapter-b: max abs 0.1" in found["golden cases"]


def test_a_source_of_another_shape_is_named(own_bundle, model, sources):
    module = sources["a"].modules[DOWN]
    smaller = replace(module, lora_B=module.lora_B[:-1])
    modules = {**sources["a"].modules, DOWN: smaller}
    found = failed(own_bundle, model, {"a": replace(sources["a"], modules=modules)})
    assert any(DOWN in detail for detail in found.values())


def test_the_logits_are_compared_where_a_graph_gives_hidden_states_too(own_bundle, model, sources):
    for file in ("model.onnx", "model.required.onnx"):
        graph = onnx.load(own_bundle / file, load_external_data=False)
        [last] = [node for node in graph.graph.node if "logits" in node.output]
        hidden = helper.make_tensor_value_info(
            "hidden_states", onnx.TensorProto.FLOAT, ["batch", "sequence", "hidden"]
        )
        graph.graph.node.append(helper.make_node("Identity", [last.input[0]], ["hidden_states"]))
        graph.graph.output.insert(0, hidden)  # as GenAI's builder orders them
        onnx.save(graph, own_bundle / file)
    update_hashes(own_bundle)
    assert failed(own_bundle, model, sources) == {}
    with torch.no_grad():
        other = copy.deepcopy(model)
        other.lm_head.weight[7] += 0.5  # of the logits alone
    assert "base: onnxruntime = torch" in failed(own_bundle, other, sources)


def test_a_required_graph_that_computes_something_else(own_bundle, model, sources):
    shutil.copyfile(own_bundle / "model.onnx", own_bundle / "model.required.onnx")
    update_hashes(own_bundle)
    found = failed(own_bundle, model, sources)
    assert found.keys() == {"model.required.onnx = model.onnx"}
    assert "inputs" in found["model.required.onnx = model.onnx"]


def test_an_adapter_that_is_not_in_the_bundle(bundle, model, sources):
    with pytest.raises(LoraportError, match="adapter 'c': expected one of the bundle's"):
        verify_bundle(bundle, model, {"c": sources["a"]})


def test_a_bundle_without_golden_inputs(own_bundle, model, sources):
    write_manifest(replace(read_manifest(own_bundle), golden={}), own_bundle)
    found = failed(own_bundle, model, sources)
    assert found == {"golden cases": "the manifest lists none"}


def test_a_bundle_that_can_have_no_golden_outputs(own_bundle, model, sources):
    write_manifest(replace(read_manifest(own_bundle), golden={}), own_bundle)
    record_no_golden(own_bundle, "no kernels here")
    report = verify_bundle(own_bundle, model, sources)
    assert report.passed
    assert [c.detail for c in report.checks if c.name == "golden cases"] == [
        "none: no kernels here"
    ]


@pytest.mark.parametrize("behind", [0, 1])
def test_generated_tokens_are_compared_after_the_same_tokens(
    bundle, model, sources, monkeypatch, behind
):
    def likeliest_but(runtime, token_ids, name, sampling):
        ids = list(token_ids)
        for _ in range(sampling.max_new_tokens):
            outputs = runtime.run(first_step_inputs(runtime, read_decoder(bundle), ids), name)
            ids.append(int(outputs["logits"][0, -1].argsort()[-1 - behind]))
            yield ids[-1]

    monkeypatch.setattr("loraport.parity.protocol.generate", likeliest_but)
    report = verify_bundle(bundle, model, {"a": sources["a"]})
    failures = [check.name for check in report.checks if not check.passed]
    assert failures == (["adapter a: greedy tokens"] if behind else [])


def test_logits_before_tokens_are_those_of_a_run_up_to_each(model):
    prompt, following = [5, 6, 7], [8, 9, 10, 11]
    got = next_token_logits(model, prompt, following)
    for index in range(len(following)):
        ids = torch.tensor([prompt + following[:index]])
        with torch.no_grad():
            expected = model(input_ids=ids).logits[0, -1]
        np.testing.assert_allclose(got[index], expected.numpy(), atol=1e-5)
    assert np.abs(got[0] - got[1]).max() > 1e-2
